"""Accuracy per layout and task on hold-out scenes, one question per prompt, as a user would ask.

Run ``python -m training.evaluate --scenes 1000``. Answers are teacher-forced, which says "exact" just as greedy
decoding does; ``sparsevlm eval`` generates them.
"""

import argparse
import json
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevlm.bundled import bundled_path
from sparsevlm.scenes import LAYOUTS, MAX_PIECES, PAIR, SINGLE_TASKS, TASKS, holdout_seeds, render
from training.forward import SceneForward
from training.groups import Group, draw_group, parse_mix
from training.objective import score_answers
from training.pixels import Patchifier
from training.sequences import SequenceBuilder

# Away from the small seeds that demos and examples use.
FIRST_SEED = 500_000
_VISUAL_TOKENS_AT_ONCE = 25_600


@torch.no_grad()
def evaluate(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: int,
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> dict[str, dict[str, float]]:
    """Exact-match accuracy of every task.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
        On any device, in any dtype.
    tokenizer : PreTrainedTokenizerFast
        The bundled tokenizer.
    scenes : int
        Hold-out scenes per layout, from ``FIRST_SEED`` on; each is asked one question per task.
    layouts : sequence of str
        Names of ``LAYOUTS``; pairs are evaluated once, with the layout of their own.

    Returns
    -------
    dict
        Share of exactly right answers, by layout and task.
    """
    accuracy = {}
    for name in (*layouts, PAIR):
        (group,) = parse_mix(f"{name}:1")
        tasks = (PAIR,) if name == PAIR else SINGLE_TASKS
        at_once = max(1, _VISUAL_TOKENS_AT_ONCE // (group.tokens * len(group.layouts)))
        hits = sum(
            _hits(model, tokenizer, group, tasks, start, min(at_once, scenes - start))
            for start in range(0, scenes, at_once)
        )
        accuracy[name] = {task: float(hits[TASKS.index(task)]) / scenes for task in tasks}
    return accuracy


def _hits(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    group: Group,
    tasks: Sequence[str],
    start: int,
    count: int,
) -> torch.Tensor:
    """Right answers by task, float32 of shape (tasks,)."""
    builder, patchify = SequenceBuilder(tokenizer, model.device), Patchifier(model.device)
    group = Group(group.layouts, count)
    tail = builder.longest_turn(MAX_PIECES)
    forward = SceneForward(model, builder.head_ids, builder.between_ids, [group], tail)
    seeds = holdout_seeds(FIRST_SEED + start, count).to(model.device)
    hits, features = torch.zeros(len(TASKS), device=model.device), None
    for task in tasks:
        batch = draw_group(group, seeds, torch.tensor([TASKS.index(task)], device=model.device), 1)
        if features is None:
            pictures = torch.stack([render(spec) for spec in batch.specs], dim=1).flatten(0, 1)
            features = forward.visual_features([patchify(pictures, model.dtype)])
        sequences = builder(batch.questions, tail)
        (decoded,) = forward.decode(features, [sequences.input_ids])
        hits += score_answers(decoded.logits, sequences, batch.questions.tasks).hits
    return hits


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(bundled_path()))
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = model.to(arguments.device).eval()
    accuracy = evaluate(model, tokenizer, arguments.scenes, arguments.layouts.split(","))
    print(json.dumps({"scenes": arguments.scenes, "first_seed": FIRST_SEED, "accuracy": accuracy}, indent=2))


if __name__ == "__main__":
    main()
