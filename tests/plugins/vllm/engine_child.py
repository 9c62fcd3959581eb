"""One engine of vLLM in a process of its own: ``python engine_child.py JOB OUT``, both JSON files."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from reference import NEW_TOKENS, Prompt


def request(prompt: Prompt, text: str) -> dict[str, Any]:
    """A prompt as vLLM takes it."""
    visual: dict[str, Any] = {}
    if prompt.images:
        visual["image"] = prompt.pictures()
    if prompt.video:
        visual["video"] = [(prompt.frames(), prompt.metadata())]
    given: dict[str, Any] = {"prompt": text, "multi_modal_data": visual}
    if prompt.options:
        given["mm_processor_kwargs"] = {"sparsevlm": prompt.options}
    return given


def dummies_of(llm: Any) -> Any:
    """What makes the inputs that an engine measures its memory with: its processor, or the registry of older vLLM."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = llm.llm_engine.renderer.mm_processor
    if hasattr(processor, "get_dummy_mm_inputs"):
        return processor.get_dummy_mm_inputs
    return partial(MULTIMODAL_REGISTRY.get_dummy_mm_inputs, llm.model_config, processor=processor)


def main() -> None:
    import vllm

    job_file, out = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    llm = vllm.LLM(**job["engine"])
    if job["dummies"]:  # as vLLM measures its memory with
        make = dummies_of(llm)
        dummies = [make({"image": 1, "video": 1}), make({"image": 2})]
        print("dummies", [sorted(one["mm_placeholders"]) for one in dummies])
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    batches = []
    for batch in job["batches"]:
        requests = []
        for text, given in batch:
            given["images"] = tuple(map(tuple, given["images"]))
            requests.append(request(Prompt(**given), text))
        try:
            outputs = llm.generate(requests, sampling, use_tqdm=False)
            found = [
                [len(one.prompt_token_ids), list(one.outputs[0].token_ids), one.num_cached_tokens] for one in outputs
            ]
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        batches.append(found)
    Path(out).write_text(json.dumps(batches), encoding="utf-8")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what vLLM started is not waited for
