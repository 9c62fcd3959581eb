"""Times one engine of vLLM in a process of its own: ``python -m benchmark.vllm_pruning_child JOB OUT``, JSON files.

:mod:`benchmark.bench_vllm_pruning` writes the job and reads what comes out. Names with an underscore are vLLM's: the
steps that its ``LLM.generate`` takes, timed one by one, so that preprocessing of images stands apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmark.vllm_setup import SIDE
from benchmark.vllm_timed_choice import timed

_WORDS = 256  # ids that every tokenizer knows
_BEFORE = 8  # text tokens in front of the image

Times = dict[str, list[float]]


class Engine:
    """vLLM with one model.

    Parameters
    ----------
    job : dict
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import vllm

        from sparsevlm.plugins.vllm import register

        register()  # where the package is not installed, vLLM finds no entry point
        self._vllm, self._ids = vllm, job["image_ids"]
        self._generator = np.random.default_rng(0)
        self._llm = vllm.LLM(**job["engine"])

    def call(self, case: dict[str, Any]) -> Times:
        """Answers new requests together; milliseconds of the call, and until the first token of each request."""
        prompts = [self._prompt(case) for _ in range(case["requests"])]
        sampling = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        inputs = list(self._llm._preprocess_cmpl(prompts))
        ready = time.perf_counter()
        for one in inputs:
            self._llm._add_request(one, sampling)
        outputs = self._llm._run_engine(output_type=self._vllm.RequestOutput, use_tqdm=False)
        end = time.perf_counter()
        found = {len(one.prompt_token_ids) for one in outputs}
        if found != {case["n_kept"] + case["n_text"]}:
            raise RuntimeError(f"prompts of {found} tokens, not of {case['n_kept']} visual and {case['n_text']} others")
        times = {"preprocess": [1e3 * (ready - begin)], "total": [1e3 * (end - ready)]}
        if case["new_tokens"] == 1 and len(outputs) == 1:
            return {**times, "first_token": times["total"]}
        metrics = [getattr(one, "metrics", None) for one in outputs]
        if all(one is not None for one in metrics):
            # From when the first request was taken up: all have come by then.
            start = min(one.scheduled_ts for one in metrics)
            times["first_token"] = [1e3 * (one.first_token_ts - start) for one in metrics]
        return times

    def _prompt(self, case: dict[str, Any]) -> dict[str, Any]:
        height, width = case["grid"]
        pixels = self._generator.integers(0, 256, (height * SIDE, width * SIDE, 3), dtype=np.uint8)
        words = self._generator.integers(0, _WORDS, case["n_text"] - 2).tolist()
        ids = [*words[:_BEFORE], *self._ids, *words[_BEFORE:]]
        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(pixels)}}
        return prompt | ({"mm_processor_kwargs": {"sparsevlm": case["options"]}} if case["options"] else {})


class TimedChoice:
    """Times the choice of tokens, per image."""

    def __init__(self) -> None:
        from sparsevlm.plugins.vllm import model

        self._module, self._choose = model, model.choose
        self.times: list[float] = []

    def __enter__(self) -> TimedChoice:
        self._module.choose = timed(self._choose, lambda ms, n_images: self.times.append(ms / n_images))
        return self

    def __exit__(self, *exc: object) -> None:
        self._module.choose = self._choose


def times_of(engine: Engine, case: dict[str, Any], job: dict[str, Any]) -> Times:
    """Times of a case's calls; of the choice in calls of its own, as it waits for the device."""
    for _ in range(job["warmup"]):
        engine.call(case)
    found: Times = {}
    for _ in range(job["calls"]):
        for phase, values in engine.call(case).items():
            found.setdefault(phase, []).extend(values)
    if case["options"] and case["n_kept"] < case["grid"][0] * case["grid"][1]:
        with TimedChoice() as timed:
            for _ in range(job["calls"]):
                engine.call(case)
        found["choice_per_request"] = timed.times
    return found


def main() -> None:
    """Runs a job; a case that fails has a note in the place of its times."""
    job_file, out = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    engine = Engine(job)
    cases: list[dict[str, Any]] = []
    for case in job["cases"]:
        try:
            cases.append({"times": times_of(engine, case, job), "note": ""})
        except Exception as error:
            cases.append({"times": {}, "note": f"failed: {type(error).__name__}: {error}"[:200]})
        Path(out).write_text(json.dumps(cases), encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's teardown can hang, and all is written
