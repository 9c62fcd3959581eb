"""Batches that the server puts together are those that the processor of each family makes of all prompts at once."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import numpy as np
import torch
from PIL import Image

from sparsevlm.inputs.turns import process, render_turn
from sparsevlm.server.merging import merged, merges, shapes
from toys.processors import PROCESSED, missing_packages


def image(width, height):
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# Whose processor lays the patches of all prompts side by side, and those that make no prompt without an image.
NOT_MERGED, WITH_IMAGES_ONLY = ("minicpmv4_6",), ("paligemma", "paligemma2")
# Texts and images of prompts, some of which fit together in every family.
PROMPTS = [
    ("word", [image(112, 112)]),
    ("word word word", [image(112, 112)]),
    ("word word", [image(168, 112)]),
    ("word", [image(112, 112), image(168, 112)]),
    ("word word", [image(84, 84), image(112, 112)]),
    ("word word word word", []),
    ("word", []),
]


@pytest.mark.parametrize("family", sorted(PROCESSED))
def test_a_merged_batch_is_that_of_the_processor(family):
    if missing := missing_packages(family):
        pytest.skip(f"needs {', '.join(missing)}")  # nox -s server has them
    processor = PROCESSED[family].make()
    processor.tokenizer.padding_side = "left"
    assert merges(processor) == (family not in NOT_MERGED)
    if family in NOT_MERGED:
        return
    asked = PROMPTS[:-2] if family in WITH_IMAGES_ONLY else PROMPTS
    prompts = []
    for text, images in asked:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        prompts.append(render_turn(processor, [{"role": "user", "content": content}]))
    alone = [process(processor, [prompt], [images]) for prompt, (_, images) in zip(prompts, asked, strict=True)]
    alone = [{name: value for name, value in one.items() if isinstance(value, torch.Tensor)} for one in alone]
    n_merged = 0
    for one, other in itertools.permutations(range(len(asked)), 2):
        if shapes(alone[one]) != shapes(alone[other]):
            continue
        n_merged += 1
        batch = merged([alone[one], alone[other]], processor.tokenizer.pad_token_id)
        whole = process(processor, [prompts[one], prompts[other]], [PROMPTS[one][1], PROMPTS[other][1]])
        assert set(batch) == {name for name, value in whole.items() if isinstance(value, torch.Tensor)}
        for name, value in batch.items():
            assert torch.equal(value, whole[name]), (name, one, other)
    assert n_merged >= 2  # those with like images at least, in both orders
