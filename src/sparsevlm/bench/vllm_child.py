"""Times vLLM in a process of its own: ``python -m sparsevlm.bench.vllm_child JOB OUT``, both JSON files.

:mod:`.vllm_dense` writes the job and reads what comes out. Names with an underscore are vLLM's (0.25): the steps that
its ``LLM.generate`` takes, timed one by one, so that preprocessing of images stands apart.
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

_PIXELS = 28  # of an image, along one side of a visual token
_WORDS = 256  # ids that every tokenizer knows
_BEFORE = 8  # text tokens in front of the image
_LEAST_LENGTH = 8192

Times = dict[str, float]
Request = list[int]  # visual tokens along height and width, tokens that are not visual


class Engine:
    """vLLM with one model.

    Parameters
    ----------
    job : dict
    """

    def __init__(self, job: dict[str, Any]) -> None:
        import vllm

        self._job, self._vllm, self.version = job, vllm, str(vllm.__version__)
        self._generator = np.random.default_rng(job["seed"])
        options: dict[str, Any] = {
            "model": job["model"], "dtype": job["dtype"], "max_model_len": max(_LEAST_LENGTH, job["longest"]),
            "limit_mm_per_prompt": {"image": 1, "video": 0}, "enable_prefix_caching": False,
            "mm_processor_cache_gb": 0, "gpu_memory_utilization": 0.6, "disable_log_stats": False, "seed": job["seed"],
        }  # fmt: skip
        if job["random"]:
            options["load_format"] = "dummy"
        try:
            self._llm = vllm.LLM(**options, compilation_config={"cudagraph_mm_encoder": True})
            self.remark = "encoder graphs on"
        except (TypeError, ValueError) as error:  # an option that this version does not know
            print(f"without encoder graphs: {error}", file=sys.stderr)
            self._llm = vllm.LLM(**options)
            self.remark = "encoder graphs off"

    def call(self, requests: list[Request], new_tokens: int, from_picture: bool) -> Times:
        """Answers requests together; milliseconds per phase."""
        prompts = [self._prompt(*request) for request in requests]
        options = {"temperature": 0.0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
        begin = time.perf_counter()
        inputs = list(self._llm._preprocess_cmpl(prompts))
        ready = time.perf_counter()
        for one in inputs:
            self._llm._add_request(one, self._vllm.SamplingParams(**options))
        outputs = self._llm._run_engine(output_type=self._vllm.RequestOutput, use_tqdm=False)
        end = time.perf_counter()
        lengths = sorted(h * w + n_text for h, w, n_text in requests)
        found = sorted(len(one.prompt_token_ids) for one in outputs)
        if found != lengths or any(len(one.outputs[0].token_ids) != new_tokens for one in outputs):
            raise RuntimeError(f"prompts of {found} tokens, not of {lengths}, or not {new_tokens} new tokens each")
        times = {"preprocess": 1e3 * (ready - begin), "total": 1e3 * (end - ready)}
        if new_tokens == 1:
            times["first_token"] = times["total"]
        elif all(getattr(one, "metrics", None) is not None for one in outputs):
            first = max(one.metrics.first_token_ts for one in outputs)
            times["first_token"] = 1e3 * (first - min(one.metrics.scheduled_ts for one in outputs))
            times["decode_per_token"] = (times["total"] - times["first_token"]) / (new_tokens - 1)
        if from_picture:
            times |= {name: times[name] + times["preprocess"] for name in ("first_token", "total") if name in times}
        return times

    def _prompt(self, height: int, width: int, n_text: int) -> dict[str, Any]:
        pixels = self._generator.integers(0, 256, (height * _PIXELS, width * _PIXELS, 3), dtype=np.uint8)
        words = self._generator.integers(0, _WORDS, n_text - 2).tolist()
        ids = [*words[:_BEFORE], *self._job["image_ids"], *words[_BEFORE:]]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(pixels)}}


def times_of(engine: Engine, case: dict[str, Any]) -> list[Times]:
    """Times the calls of a case once each, or the only one until its time is over."""
    options = case["new_tokens"], case["from_picture"]
    for call in case["warmup"]:
        engine.call(call, *options)
    if len(case["calls"]) > 1:
        return [engine.call(call, *options) for call in case["calls"]]
    times: list[Times] = []
    begin = time.perf_counter()
    while len(times) < case["most"] and (len(times) < case["least"] or time.perf_counter() - begin < case["seconds"]):
        times.append(engine.call(case["calls"][0], *options))
    return times


def main() -> None:
    """Runs a job; a case that fails has a note in the place of its times."""
    job_file, out = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    engine = Engine(job)
    cases: dict[str, Any] = {}
    for case in job["cases"]:
        try:
            cases[case["name"]] = {"times": times_of(engine, case), "note": ""}
        except Exception as error:
            cases[case["name"]] = {"times": [], "note": f"failed: {type(error).__name__}: {error}"[:200]}
    found = {"version": engine.version, "remark": engine.remark, "cases": cases}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's teardown can hang, and all is written
