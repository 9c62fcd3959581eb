"""Benchmark of the time until the first answers after ``apply_sparsevlm``, with Triton's cache empty and filled.

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

CASES, SMALL_CASES = (Case(4096, 1, 8), Case(1024, 1, 8), Case(256, 1, 8)), (Case(64, 1, 8), Case(36, 1, 8))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures with both caches and appends the rows."""
    bench = Bench.begin("bench_ready", "ready.csv", arguments)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder}
        for cache in ("empty", "filled"):
            child = [sys.executable, "-m", "benchmark.bench_ready", "--child", str(bench.device), str(int(bench.small))]
            output = subprocess.run(child, env=environment, check=True, capture_output=True, text=True).stdout
            for operation, shape, milliseconds in json.loads(output.splitlines()[-1]):
                bench.keep(operation, shape, "ours", "ms", [milliseconds], timing=f"Triton's cache {cache}")
    bench.end()


def child(device: str, small: bool) -> None:
    """Loads, applies with warm-up and answers a request of each size, in a process of its own."""
    cases = SMALL_CASES if small else CASES
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_model("tiny" if small else "7b", device, dtype, "sdpa")
    generator = torch.Generator(device=device).manual_seed(0)
    ahead, requests = ([fresh_inputs(model, case, generator) for case in cases] for _ in range(2))
    begin = _now(device)
    state = apply_sparsevlm(model, keep=0.25, engine=True)
    state.warmup(*ahead, max_new_tokens=cases[0].new_tokens)
    times = [("apply and warm-up", ", ".join(case.name for case in cases), 1e3 * (_now(device) - begin))]
    for case, inputs in zip(cases, requests, strict=True):
        begin = _now(device)
        model.generate(**inputs, max_new_tokens=case.new_tokens, min_new_tokens=case.new_tokens, do_sample=False)
        times.append(("first request after that", case.name, 1e3 * (_now(device) - begin)))
    print(json.dumps(times))


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3] == "1")
    else:
        main()
