"""Blank images of the families that have them, one and several to a prompt."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from toys import tiny_model

# Grids of two images that are asked for, and what the report says of them.
ASKED = ((1, 3, 4), (1, 4, 6))
GRIDS = {
    "qwen2_5_vl": ASKED,
    "qwen3_vl": ASKED,
    "llava": ((1, 4, 4),) * 2,
    "internvl": ((3, 2, 2), (6, 2, 2)),
    "mistral3": ASKED,
}


@pytest.mark.parametrize("family", GRIDS)
def test_several_images_in_one_prompt(family):
    model = tiny_model(family)
    state = apply_sparsevlm(model, keep=1.0)
    adapter = state.adapter
    images = [adapter.family.blank_image(adapter, grid) for grid in ASKED]
    inputs = adapter.family.inputs_of(adapter, images, 20)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=1)
    (sample,) = state.report.samples
    assert (sample.n_visual, sample.n_text) == (sum(image.n_visual for image in images), 20)
    assert sample.grids == GRIDS[family]


def test_tokens_around_images_part_them():
    adapter = apply_sparsevlm(tiny_model()).adapter
    images = [adapter.family.blank_image(adapter, grid) for grid in ((1, 1, 2), (1, 1, 3))]
    config, word = adapter.model.config, 0
    around = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
    start, token, end = around
    ids = adapter.family.inputs_of(adapter, images, 8)["input_ids"].tolist()
    assert ids == [[word, word, start, token, token, end, start, token, token, token, end, word, word]]
    with pytest.raises(ValueError, match="2 images do not fit amid 3 other tokens: 4 are needed"):
        adapter.family.inputs_of(adapter, images, 3)
