"""Arrangements of visual tokens: counts, separators, coordinates, and what families tell of their images."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.models import Tiles, adapter_for, n_tokens, separators
from sparsevlm.models.layout import grid_coordinates, places
from toys import FAMILIES, PROMPTS, make_inputs, tiny_model

# A picture of 1 x 2, then one of 2 x 1 whose rows end; one more separator at the very end.
PICTURE = Tiles(((1, 3, 3), (1, 4, 6)), (False, True))  # of the toys
TWO_PARTS = Tiles(((1, 1, 2), (1, 2, 1)), (False, True), True)


def test_tiles_by_hand():
    assert (n_tokens((2, 3, 4)), n_tokens(TWO_PARTS)) == (24, 7)
    assert separators(TWO_PARTS).tolist() == [False, False, False, True, False, True, True]
    time, height, width = places((TWO_PARTS, (1, 1, 1))).tolist()
    assert time == [0, 0, 1, 1, 1, 1, 1, 2]
    assert height == [0, 0, 0, 0, 1, 1, 1, 0]
    assert width == [0, 1, 0, 1, 0, 1, 1, 0]


def test_coordinates_with_separators_and_without():
    assert grid_coordinates([TWO_PARTS], torch.arange(7)).shape == (3, 7)
    assert grid_coordinates([TWO_PARTS], torch.arange(4))[1].tolist() == [0, 0, 0, 1]
    unknown = torch.tensor([4, 6, 9])
    assert torch.equal(grid_coordinates([TWO_PARTS], unknown), unknown.expand(3, -1))
    assert torch.equal(grid_coordinates([], unknown), unknown.expand(3, -1))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (6, 4), (2, 6), (3, 3), (1, 1), (6, 6), (5, 2)])
def test_tiles_are_those_that_the_model_joins(name, scaled, size):
    model = tiny_model(name)
    if scaled and name == "llava_onevision":
        model.config.vision_aspect_ratio = "anyres_max_1"
    adapter = adapter_for(model)
    inputs = FAMILIES[name].kinds["image"].inputs(torch.Generator().manual_seed(0), *size)
    with torch.no_grad():
        (features,) = model.model.get_image_features(**inputs).pooler_output
    (layout,) = adapter.family.layouts(adapter, "image", inputs)
    assert n_tokens(layout) == features.shape[0]
    newline = (features == model.model.image_newline).all(dim=-1)
    assert torch.equal(separators(layout), newline)
    assert int(newline.sum()) > 0


def test_pictures_among_others_are_not_cut():
    model = tiny_model("llava_onevision")
    adapter = adapter_for(model)
    image = FAMILIES["llava_onevision"].kinds["image"].inputs(torch.Generator(), 4, 6)
    inputs = {name: torch.cat([value] * 3) for name, value in image.items()}
    inputs["batch_num_images"] = torch.tensor([1, 2])
    cut, alone, _ = adapter.family.layouts(adapter, "image", inputs)
    assert (len(cut.parts), alone) == (2, Tiles(((1, 3, 3),), (False,), True))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("call", ["generate", "model"])
def test_newlines_stay_unless_the_family_drops_them(name, call, monkeypatch):
    model, inputs = tiny_model(name), make_inputs(*PROMPTS["two images"], family=name)
    newlines = (separators(PICTURE).nonzero().squeeze(-1) + 2).tolist()
    for protects in (True, False):
        state = apply_sparsevlm(model, keep=0.5, min_keep=1, target_layers=[1])
        family = state.adapter.family
        object.__setattr__(family, "protects_separators", protects)
        try:
            if call == "generate":
                model.generate(**inputs, max_new_tokens=1)
            else:
                with torch.no_grad():
                    model(**inputs)
        finally:
            object.__setattr__(family, "protects_separators", True)
        (sample,) = state.report.samples
        visual = set(sample.visual_positions)
        assert sample.n_visual == 2 * (33 if protects else 37)
        assert all((position in visual) != protects for position in newlines)
        assert sample.stages[0].per_image == () or len(sample.stages[0].per_image) == 2


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
@pytest.mark.parametrize("hidden", ["a token", "an image"])
@pytest.mark.parametrize("engine", [False, True])
def test_a_mask_may_hide_placeholders(name, hidden, engine):
    model, inputs = tiny_model(name), make_inputs(*PROMPTS["two images"], family=name)
    found = (inputs["input_ids"][0] == FAMILIES[name].kinds["image"].token).nonzero()[:, 0]
    inputs["attention_mask"][0, found[1:2] if hidden == "a token" else found[: len(found) // 2]] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(**inputs, **options)
    state = apply_sparsevlm(model, keep=1.0, engine=engine)
    torch.testing.assert_close(model.generate(**inputs, **options).logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert state.report.path == ("engine" if engine else "plain")
    with state.options(keep=0.5, min_keep=1, target_layers=[1], min_keep_per_image=2):
        model.generate(**inputs, **options)
    (sample,) = state.report.samples
    first, second = sample.stages[0].per_image
    n_all = len(found) - 2 * 4 * (name == "llava_next")  # four rows of a picture end in a newline
    assert sample.n_visual == n_all - (1 if hidden == "a token" else n_all // 2)
    assert first >= 2 or hidden == "an image"
    assert second >= 2


@pytest.mark.parametrize(
    ("name", "places_of_first"),
    [
        ("internvl", {(0, 0, 0), (0, 1, 1), (2, 1, 1)}),
        ("llava", {(0, 0, 0), (0, 3, 3)}),
        ("llava_next", {(0, 2, 2), (1, 0, 0), (1, 3, 5)}),
        ("llava_onevision", {(0, 2, 2), (1, 0, 0), (1, 3, 5)}),
    ],
)
def test_visual_tokens_have_places(name, places_of_first):
    class Looks:
        placement, needs = "before_decoder", frozenset()

        def select(self, context, n_keep):
            self.coordinates, self.image_idx = context.coordinates, context.image_idx
            return torch.arange(n_keep)

    model, selector = tiny_model(name), Looks()
    apply_sparsevlm(model, selector=selector, keep=0.5, min_keep=1, min_keep_per_image=0)
    model.generate(**make_inputs(*PROMPTS["two images"], family=name), max_new_tokens=1)
    first = {tuple(place) for place in selector.coordinates[:, selector.image_idx == 0].T.tolist()}
    assert places_of_first <= first
    every = [tuple(place) for place in selector.coordinates.T.tolist()]
    assert len(set(every)) == len(every)
