"""Random inputs of ``generate``: noise images and texts of random words, new in every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cases import Case

_BEFORE = 8  # text tokens in front of the image


def fresh_inputs(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws inputs of ``generate`` in the form of the model's processor.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration or Qwen2VLForConditionalGeneration
    case : Case
    generator : torch.Generator
        On the model's device.
    """
    config, device = model.config, model.device
    vision = config.vision_config
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    n_words = config.text_config.vocab_size - len(special)
    words = torch.randint(0, n_words, (case.batch, case.n_text - 2), generator=generator, device=device)
    for token_id in sorted(special):
        words += words >= token_id  # no word is a special token

    def column(token: int, n: int = 1) -> Tensor:
        return torch.full((case.batch, n), token, dtype=torch.int64, device=device)

    ids = [words[:, :_BEFORE], column(config.vision_start_token_id), column(config.image_token_id, case.n_visual)]
    input_ids = torch.cat([*ids, column(config.vision_end_token_id), words[:, _BEFORE:]], dim=1)
    height, width = (side * vision.spatial_merge_size for side in case.grid)
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == config.image_token_id).long(),
        "pixel_values": torch.randn(case.batch * height * width, size, generator=generator, device=device),
        "image_grid_thw": torch.tensor([[1, height, width]] * case.batch, device=device),
    }
