"""Benchmark of the time until the first answers after ``apply_sparsevlm``, with Triton's cache empty and filled.

``python -m benchmark.bench_ready`` starts a process for each cache and each of two calls, the default one and a quarter
of the tokens, and appends its rows to ``results/ready.csv``: the warm-up of the whole ladder, then the first and the
second request of three shapes that the ladder does not hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmark.timed import Bench
from sparsevlm import SparseVLMState, apply_sparsevlm
from sparsevlm.bench.cases import Case
from sparsevlm.bench.shapes import random_model
from sparsevlm.bench.workload import fresh_inputs

# Options by the names that rows of whole calls have for them; nothing is set in the default call.
CALLS: dict[str, dict[str, Any]] = {"ours-default": {}, "ours": {"keep": 0.25, "engine": True}}
# The ladder's images are as good as square.
CASES = (Case(3591, 1, 8, 133, 63), Case(1026, 1, 8, 77, 38), Case(312, 1, 8, 51, 13))
SMALL_CASES = (Case(66, 1, 8, 51, 11), Case(50, 1, 8, 40, 10), Case(40, 1, 8, 30, 8))
_SECONDS = 300.0  # so that the warm-up leaves nothing out

Found = tuple[str, str, str, float, str]  # operation, shape, metric, value, note


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both calls with both caches and appends the rows."""
    bench = Bench.begin("bench_ready", "ready.csv", arguments)
    for provider in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "TRITON_CACHE_DIR": folder}
            for cache in ("empty", "filled"):
                command = [sys.executable, "-m", "benchmark.bench_ready", "--child", provider, str(bench.device)]
                output = subprocess.run(
                    [*command, str(int(bench.small))], env=environment, check=True, stdout=subprocess.PIPE, text=True
                ).stdout
                for operation, shape, metric, value, note in json.loads(output.splitlines()[-1]):
                    timing = f"Triton's cache {cache}"
                    bench.keep(operation, shape, provider, metric, [value], timing=timing, note=note)
    bench.end()


def child(provider: str, device: str, small: bool) -> None:
    """Loads, applies with warm-up and answers two requests of each shape, in a process of its own."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = random_model("tiny" if small else "7b", device, dtype, "sdpa")
    generator = torch.Generator(device=device).manual_seed(0)
    cases = SMALL_CASES if small else CASES
    requests = [(case, [fresh_inputs(model, case, generator) for _ in range(2)]) for case in cases]
    begin = _now(device)
    state = apply_sparsevlm(model, **CALLS[provider])
    report = state.warmup(seconds=_SECONDS)
    took, shape = 1e3 * (_now(device) - begin), "up to 4096 visual tokens"
    note = f"{report.n_run} of {report.n_run + report.n_left} requests of the ladder"
    found: list[Found] = [("apply and warm-up", shape, "ms", took, note)]
    if report.n_bytes:
        found.append(("apply and warm-up", shape, "bytes", report.n_bytes, note))
    for case, inputs in requests:
        shape = f"{case.n_visual} visual ({' x '.join(map(str, case.grid))}) + {case.n_text}, {case.new_tokens} new"
        for which, one in zip(("first", "second"), inputs, strict=True):
            found.append((f"{which} request of a shape", shape, "ms", *_answer(state, case, one, device)))
    print(json.dumps(found))


def _answer(state: SparseVLMState, case: Case, inputs: dict[str, Any], device: str) -> tuple[float, str]:
    """Milliseconds of a request, and the path that it ran on."""
    options = {"max_new_tokens": case.new_tokens, "min_new_tokens": case.new_tokens, "do_sample": False}
    begin = _now(device)
    state.adapter.model.generate(**inputs, **options)
    return 1e3 * (_now(device) - begin), f"path {state.report.path}"


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], sys.argv[4] == "1")
    else:
        main()
