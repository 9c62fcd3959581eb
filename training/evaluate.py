"""Accuracy per task on hold-out scenes, one question per prompt, as a user would ask.

Run ``python -m training.evaluate --scenes 1000``.
"""

import argparse
import json

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevlm.bundled import bundled_path
from sparsevlm.scenes import DEFAULT_LAYOUT, TASKS, ask, holdout_seeds, render, sample_specs
from training.forward import SceneForward
from training.objective import score_answers
from training.pixels import PATCH, Patchifier
from training.sequences import SequenceBuilder

# Away from the small seeds that demos and examples use.
FIRST_SEED = 500_000


@torch.no_grad()
def evaluate(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: int,
    batch: int = 100,
) -> dict[str, float]:
    """Exact-match accuracy of every task.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        On any device, in any dtype.
    tokenizer : PreTrainedTokenizerFast
        The bundled tokenizer.
    scenes : int
        Hold-out scenes, from ``FIRST_SEED`` on; each is asked one question per task.
    batch : int
        Scenes at a time.

    Returns
    -------
    dict of str to float
        Share of exactly right answers, by task.
    """
    builder, patchify = SequenceBuilder(tokenizer, model.device), Patchifier(model.device)
    grid = (DEFAULT_LAYOUT.height // PATCH, DEFAULT_LAYOUT.width // PATCH)
    forward = SceneForward(model, builder.head_ids, grid)
    hits = torch.zeros(len(TASKS), device=model.device)
    for start in range(0, scenes, batch):
        seeds = holdout_seeds(FIRST_SEED + start, min(batch, scenes - start)).to(model.device)
        spec = sample_specs(seeds)
        features = forward.visual_features(patchify(render(spec), model.dtype))
        for task in range(len(TASKS)):
            tasks = torch.full((len(seeds), 1), task, device=model.device)
            sequences = builder(ask(spec, tasks))
            logits = forward.answer_logits(features, sequences.input_ids, sequences.answer_rows.flatten(1))
            hits += score_answers(logits, sequences.targets, tasks).hits
    return {task: hit / scenes for task, hit in zip(TASKS, hits.tolist(), strict=True)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(bundled_path()))
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    accuracy = evaluate(model.to(arguments.device).eval(), tokenizer, arguments.scenes, arguments.batch)
    print(json.dumps({"scenes": arguments.scenes, "first_seed": FIRST_SEED, "accuracy": accuracy}, indent=2))


if __name__ == "__main__":
    main()
