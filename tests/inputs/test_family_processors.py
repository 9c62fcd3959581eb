"""The real processor of every family: what it makes is found as it lies, and keeping all of it changes nothing."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from sparsevlm import apply_sparsevlm
from sparsevlm.cli.asking import build_inputs
from sparsevlm.inputs import load_processor, torchvision_works
from toys import FAMILIES, IS_OLD, tiny_model
from toys.processors import PROCESSED, save_processor

# By family, parts (t, h, w) of a picture of 168 x 112 and of one of 84 x 84, where they are no 4 x 6 and 3 x 3.
GRIDS = [[(1, 4, 6)], [(1, 3, 3)]]
SQUASHED = [[(1, 3, 3)], [(1, 3, 3)]]
WITHOUT_MARGINS = [[(1, 3, 3), (1, 4, 6)], [(1, 3, 3), (1, 6, 6)]]
PARTS = {
    "llava": [[(1, 4, 4)], [(1, 4, 4)]],
    "gemma3": [[(1, 4, 4)], [(1, 4, 4)]],
    "paligemma": SQUASHED,
    "deepseek_vl": SQUASHED,
    "llava_next": WITHOUT_MARGINS,
    "llava_onevision": SQUASHED,  # several images are not cut
    "internvl": [[(7, 2, 2)], [(5, 2, 2)]],
    "idefics3": [[(7, 2, 2)], [(10, 2, 2)]],
    "smolvlm": [[(7, 2, 2)], [(10, 2, 2)]],
    "ovis2": [[(7, 2, 2)], [(5, 2, 2)]],
}
# Views (rows, columns, height, width) of both; Ovis2 stretches a wide picture over a tall arrangement.
VIEWS = {
    "llava_next": [((1, 1, 3, 3), (1, 1, 4, 6)), ((1, 1, 3, 3), (1, 1, 6, 6))],
    "llava_onevision": [((1, 1, 3, 3),), ((1, 1, 3, 3),)],
    "internvl": [((6, 0, 2, 2), (1, 1, 2, 2)), ((4, 0, 2, 2), (1, 1, 2, 2))],
    "idefics3": [((2, 3, 2, 2), (1, 1, 2, 2)), ((3, 3, 2, 2), (1, 1, 2, 2))],
    "smolvlm": [((2, 3, 2, 2), (1, 1, 2, 2)), ((3, 3, 2, 2), (1, 1, 2, 2))],
    "ovis2": [((1, 1, 2, 2), (3, 2, 2, 2)), ((1, 1, 2, 2), (2, 2, 2, 2))],
}
# Of a video of four frames where no input names its grid: images that it is, and their parts.
VIDEOS = {
    "llava_onevision": [[(4, 2, 2)]],
    "internvl": [[(1, 2, 2)]] * 4,
    "smolvlm": [[(1, 2, 2)]] * 4,
}


class Looks:
    """A selector that remembers where the tokens are."""

    placement, needs = "before_decoder", frozenset()

    def select(self, context, n_keep):
        self.coordinates, self.image_idx = context.coordinates, context.image_idx
        return torch.arange(n_keep)


def skip_without(family):
    for name in PROCESSED[family].needs:
        found = torchvision_works() if name == "torchvision" else importlib.util.find_spec(name)
        if not found:
            pytest.skip(f"the processor of {family} needs {name}")


@pytest.fixture(params=FAMILIES)
def family(request):
    skip_without(request.param)
    return request.param


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def places(parts):
    """Time, row and column of each token of an image that begins at zero."""
    found, start = [], 0
    for t, h, w in parts:
        found += [(start + i, y, x) for i in range(t) for y in range(h) for x in range(w)]
        start += t
    return found


def from_zero(coordinates):
    """The same of what was read: rows and columns from the first of the image, times as steps."""
    time, height, width = coordinates
    steps = torch.unique(time, return_inverse=True)[1]
    return [tuple(place) for place in torch.stack((steps, height - height[0], width - width[0])).T.tolist()]


def with_logits(model, inputs):
    output = model.generate(**inputs, max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    return torch.stack(output.logits)


def check(model, inputs, images, views=()):
    dense = with_logits(model, inputs)
    with apply_sparsevlm(model, keep=1.0):
        assert torch.equal(with_logits(model, inputs), dense)
    looks = Looks()
    with apply_sparsevlm(model, selector=looks, keep=0.5, min_keep=1, min_keep_per_image=0) as state:
        assert not torch.equal(with_logits(model, inputs), dense)
    (sample,) = state.report.samples
    wanted = [places(parts) for parts in images]
    assert list(sample.images) == [len(one) for one in wanted]
    assert sample.n_visual == sum(sample.images)
    got = [from_zero(looks.coordinates[:, looks.image_idx == i]) for i in range(len(images))]
    assert got == wanted
    assert sample.views == tuple(views)
    return sample


def placeholders(inputs, family, kind):
    return int((inputs["input_ids"] == FAMILIES[family].kinds[kind].token).sum())


def test_images_of_a_processor(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    processor = load_processor(save_processor(family, tmp_path))
    assert type(processor).__name__ == PROCESSED[family].name
    inputs = build_inputs(processor, "what is in the picture", images=[picture(168, 112), picture(84, 84, 1)])
    parts = PARTS.get(family, GRIDS)
    sample = check(model, inputs, parts, VIEWS.get(family, ()))
    newlines = {"llava_next": 4 + 6, "llava_onevision": 2}.get(family, 0)
    assert placeholders(inputs, family, "image") == sample.n_visual + newlines
    if not newlines:
        assert sample.grids == tuple((sum(t for t, _, _ in own), *own[0][1:]) for own in parts)


@pytest.mark.parametrize("family", [name for name, one in PROCESSED.items() if one.video], indirect=True)
def test_a_video_of_a_processor(family, tmp_path):
    if family == "kimi_k25" and IS_OLD:
        pytest.skip("this transformers does not run videos of Kimi K2.5")
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    processor = load_processor(save_processor(family, tmp_path))
    frames = [picture(168, 112, seed) for seed in range(4)]
    inputs = build_inputs(processor, "what is in the video", frames=frames)
    images = VIDEOS.get(family)
    if images is None:
        t, h, w = inputs["video_grid_thw"][0].tolist()
        images = [[(1 if family == "kimi_k25" else t, h // 2, w // 2)]]
        assert len(inputs["video_grid_thw"]) == 1
    sample = check(model, inputs, images)
    if (kind := "video") in FAMILIES[family].kinds:
        assert placeholders(inputs, family, kind) == sample.n_visual + (family == "llava_onevision")
