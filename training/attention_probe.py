"""Where the question's text looks: attention on the visual tokens that hold the answer, by layer.

Run ``python -m training.attention_probe --task number --scenes 64``. This is what attention-based pruning has to work
with.
"""

import argparse
import json

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from sparsevlm.bundled import bundled_path
from sparsevlm.scenes import SINGLE_TASKS, TASKS, SceneSpec, holdout_seeds, picture_boxes, render
from training.evaluate import FIRST_SEED
from training.groups import TOKEN, draw_group, parse_mix
from training.pixels import PATCH, Patchifier, full_patches
from training.sequences import IGNORE, SequenceBuilder

_TOP = 64


@torch.no_grad()
def answer_attention(folder: str, task: str, scenes: int) -> dict[int, dict[str, float]]:
    """Mean over scenes of the head-mean attention of the question's text rows, template included.

    Returns
    -------
    dict
        By layer: ``visual``, the last row's mass on all visual tokens; ``answer``, the share of that on the tokens of
        the objects that the question is about; ``area``, their share of the visual tokens; ``recall``, how many of
        them are among the 64 with the most attention of all rows. Scenes without such objects do not count.
    """
    device = torch.device("cpu")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    builder, patchify = SequenceBuilder(AutoTokenizer.from_pretrained(folder), device), Patchifier(device)
    (group,) = parse_mix("square:1")
    tail, rows = builder.longest_turn(1), {}
    for seed in range(FIRST_SEED, FIRST_SEED + scenes):
        batch = draw_group(group, holdout_seeds(seed, 1), torch.tensor([TASKS.index(task)]), 1)
        sequences = builder(batch.questions, tail)
        asked = _tokens_of(batch.specs[0], batch.questions.cells[0, 0])
        if not bool(asked.any()):
            continue
        # Up to the row that predicts the first token of the answer; a long answer may not fit, its question does.
        first = (sequences.targets[0] != IGNORE).nonzero()[:1] if bool(sequences.complete.all()) else None
        n_rows = tail if first is None or not first.numel() else int(first) + 1
        pad = torch.full((1, group.tokens), model.config.image_token_id)
        input_ids = torch.cat([builder.head_ids[None], pad, sequences.input_ids[:, :n_rows]], dim=1)
        is_image = input_ids == model.config.image_token_id
        layout = group.layouts[0]
        output = model(
            input_ids=input_ids,
            pixel_values=full_patches(patchify(render(batch.specs[0]), torch.float32)),
            image_grid_thw=torch.tensor([[1, layout.height // PATCH, layout.width // PATCH]]),
            mm_token_type_ids=is_image.long(),
            output_attentions=True,
        )
        for layer, attention in enumerate(output.attentions):
            seen = attention[0, :, -n_rows:].mean(dim=0)[:, is_image[0]]
            top = torch.zeros_like(asked).index_fill(0, seen.sum(dim=0).topk(_TOP).indices, True)
            last = seen[-1]
            values = (last.sum(), last[asked].sum() / last.sum(), asked.float().mean())
            rows.setdefault(layer, []).append([*map(float, values), float((asked & top).sum() / asked.sum())])
    names = ("visual", "answer", "area", "recall")
    return {
        layer: dict(zip(names, torch.tensor(values).mean(dim=0).tolist(), strict=True))
        for layer, values in rows.items()
    }


def _tokens_of(spec: SceneSpec, cells: torch.Tensor) -> torch.Tensor:
    """Visual tokens in raster order, bool of shape (tokens,), that touch the object of one of the cells."""
    left, top, right, bottom = picture_boxes(spec)[0][cells].unbind(-1)
    token = torch.arange(spec.layout.height // TOKEN * (spec.layout.width // TOKEN))
    y, x = token // (spec.layout.width // TOKEN) * TOKEN, token % (spec.layout.width // TOKEN) * TOKEN
    down = (y < bottom[:, None]) & (y + TOKEN > top[:, None])
    across = (x < right[:, None]) & (x + TOKEN > left[:, None])
    return (down & across).any(dim=0)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(bundled_path()))
    parser.add_argument("--task", default="number", choices=SINGLE_TASKS)
    parser.add_argument("--scenes", type=int, default=64)
    arguments = parser.parse_args()
    for layer, row in answer_attention(arguments.model, arguments.task, arguments.scenes).items():
        print(json.dumps({"layer": layer, **{name: round(value, 3) for name, value in row.items()}}))


if __name__ == "__main__":
    main()
