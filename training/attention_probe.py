"""Where the last prompt token looks: attention mass on the visual tokens of the asked card, by layer.

Run ``python -m training.attention_probe --scenes 64``. This is what attention-based pruning has to work with.
"""

import argparse
import json

import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from sparsevlm.bundled import bundled_path
from sparsevlm.scenes import TASKS, ask, holdout_seeds, render, sample_specs
from training.evaluate import FIRST_SEED
from training.objective import token_labels
from training.pixels import Patchifier, full_patches
from training.sequences import SequenceBuilder

_EMPTY = 9
_GRID = 32  # patches per side


@torch.no_grad()
def card_attention(folder: str, scenes: int) -> dict[int, dict[str, float]]:
    """Mean over scenes of the head-mean attention of the last prompt token of a number question.

    Returns
    -------
    dict
        By layer: ``visual``, the mass on all visual tokens; ``card``, the share of that on the asked card;
        ``others``, the share on the other two cards; ``area``, the card's share of the visual tokens;
        ``recall64``, the share of the card's tokens among the 64 most attended ones.
    """
    device = torch.device("cpu")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    builder, patchify = SequenceBuilder(AutoTokenizer.from_pretrained(folder), device), Patchifier(device)
    rows: dict[int, list[list[float]]] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + scenes):
        spec = sample_specs(holdout_seeds(seed, 1))
        questions = ask(spec, torch.tensor([[TASKS.index("number")]]))
        sequences = builder(questions)
        prompt = sequences.input_ids[:, : int(sequences.answer_rows[0, 0, 0]) + 1]
        pad = torch.full((1, 256), model.config.image_token_id)
        input_ids = torch.cat([builder.head_ids[None], pad, prompt], dim=1)
        is_image = input_ids == model.config.image_token_id
        output = model(
            input_ids=input_ids,
            pixel_values=full_patches(patchify(render(spec), torch.float32)),
            image_grid_thw=torch.tensor([[1, _GRID, _GRID]]),
            mm_token_type_ids=is_image.long(),
            output_attentions=True,
        )
        shown = token_labels(spec)[0, ..., 0] != _EMPTY
        card = _raster(shown & questions.cells[0, 0][:, None])
        others = _raster(token_labels(spec)[0, ..., 0] == _EMPTY - 1) & ~card
        for layer, attention in enumerate(output.attentions):
            mass = attention[0, :, -1].mean(dim=0)[is_image[0]]
            top = torch.zeros_like(card).index_fill(0, mass.topk(64).indices, True)
            total = mass.sum()
            values = (total, mass[card].sum() / total, mass[others].sum() / total, card.float().mean())
            rows.setdefault(layer, []).append([*map(float, values), float((card & top).sum() / card.sum())])
    names = ("visual", "card", "others", "area", "recall64")
    return {
        layer: dict(zip(names, torch.tensor(values).mean(dim=0).tolist(), strict=True))
        for layer, values in rows.items()
    }


def _raster(per_cell: torch.Tensor) -> torch.Tensor:
    """(cells, tokens per cell) of a 4x4 grid of 4x4 tokens to raster order (256,)."""
    return per_cell.view(4, 4, 4, 4).transpose(1, 2).flatten()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(bundled_path()))
    parser.add_argument("--scenes", type=int, default=64)
    arguments = parser.parse_args()
    for layer, row in card_attention(arguments.model, arguments.scenes).items():
        print(json.dumps({"layer": layer, **{name: round(value, 3) for name, value in row.items()}}))


if __name__ == "__main__":
    main()
