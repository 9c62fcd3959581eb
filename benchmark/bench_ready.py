"""Benchmark of the time until the first answer after ``apply_sparsevlm``, with Triton's cache empty and filled.

``python -m benchmark.bench_ready`` starts a process for each and appends its rows to ``results/ready.csv``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from benchmark.timed import Bench
from sparsevlm import apply_sparsevlm
from sparsevlm.bench.cases import Case
from sparsevlm.bench.shapes import random_model
from sparsevlm.bench.workload import fresh_inputs

CASE, SMALL_CASE = Case(1024, 1, 8), Case(36, 1, 8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures with both caches and appends the rows."""
    bench = Bench.begin("bench_ready", "ready.csv", arguments)
    case = SMALL_CASE if bench.small else CASE
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        for cache in ("empty", "filled"):
            child = [sys.executable, "-m", "benchmark.bench_ready", "--child", str(bench.device), str(int(bench.small))]
            output = subprocess.run(child, env=environment, check=True, capture_output=True, text=True).stdout
            times = json.loads(output.splitlines()[-1])
            for operation, milliseconds in times.items():
                bench.keep(operation, case.name, "ours", "ms", [milliseconds], timing=f"Triton's cache {cache}")
    bench.end()


def child(device: str, small: bool) -> None:
    """Loads, applies with warmup and answers, in a process of its own."""
    case = SMALL_CASE if small else CASE
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_model("tiny" if small else "7b", device, dtype, "sdpa")
    generator = torch.Generator(device=device).manual_seed(0)
    requests = [fresh_inputs(model, case, generator) for _ in range(2)]
    options = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens, "do_sample": False}
    begin = _now(device)
    state = apply_sparsevlm(model, keep=0.25, engine=True)
    state.warmup(requests[0], max_new_tokens=case.new_tokens)
    ready = _now(device)
    model.generate(**requests[1], **options)
    end = _now(device)
    print(json.dumps({"apply and warm-up": 1e3 * (ready - begin), "first request after that": 1e3 * (end - ready)}))


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3] == "1")
    else:
        main()
