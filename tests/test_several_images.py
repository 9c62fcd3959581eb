"""Several images in one prompt: what each keeps on both paths, what the report says, and what one image is spared."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.report import Report
from sparsevlm.selection.selectors import SELECTORS
from sparsevlm.selection.selectors.span import SpanSelector
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.5}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
BEFORE = {"span-features", "visionzip", "hiprune", "divprune", "cdpruner", "scope", "mmtok", "tome"}
BLANK_FIRST = [("text", 2), ("image", 4, 4), ("text", 4), ("image", 6, 6), ("text", 5)]
MANY = {
    "a blank image": [BLANK_FIRST],
    "image and video": [[("text", 2), ("video", 2, 4, 4), ("text", 1), ("image", 4, 4), ("text", 5)]],
    "a batch of one, two and three": [
        [("text", 3), ("image", 5, 6), ("text", 6)],
        BLANK_FIRST,
        [("image", 1, 3), ("text", 1), ("image", 6, 6), ("text", 2), ("image", 2, 4), ("text", 3)],
        [("text", 9)],
    ],
}


def inputs_of(prompt):
    """Inputs whose first image is blank: every patch is zero."""
    inputs = make_inputs(*MANY[prompt])
    name = "pixel_values" if prompt != "image and video" else "pixel_values_videos"
    first = 0 if not prompt.startswith("a batch") else 4 * 30
    inputs[name][first : first + 4 * 16] = 0.0
    return inputs


def options_of(selector, **options):
    options = {**OPTIONS, "selector": selector, **options}
    if selector in BEFORE:
        del options["target_layers"]
    return options


def check(report, min_keep):
    for sample in report.samples:
        assert sum(sample.images) == sample.n_visual
        for stage in sample.stages:
            n_out = stage.n_kept + stage.n_recycled
            assert sum(stage.per_image) == n_out
            if len(sample.images) < 2:
                continue
            assert all(one >= min(min_keep, n) for one, n in zip(stage.per_image, sample.images, strict=True))
            ends = torch.tensor(sample.images).cumsum(0)
            images = torch.bucketize(torch.tensor([*stage.kept, *stage.recycled]), ends, right=True)
            assert torch.bincount(images, minlength=len(ends)).tolist() == list(stage.per_image)


@pytest.mark.parametrize("prompt", MANY)
@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_every_image_keeps_its_floor(selector, prompt):
    model = tiny_model()
    state = apply_sparsevlm(model, **options_of(selector, keep=0.5))
    model.generate(**inputs_of(prompt), **GREEDY)
    report = state.report
    check(report, 4)
    assert not report.budget_clamped
    assert any(stage.n_kept < stage.n_in for sample in report.samples for stage in sample.stages)
    assert Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_floors_of_images_of_very_different_sizes(selector):
    """What the quick start says, with the defaults for both floors."""
    model = tiny_model(n_layers=12)
    state = apply_sparsevlm(model, selector=selector, keep=0.4)
    for sides in ([5], [4, 4]):  # the prompt has no more than min_keep
        model.generate(**make_inputs(_prompt(sides)), max_new_tokens=1)
        (sample,) = state.report.samples
        assert set(sample.layer_tokens) == {sum(sample.images)}
        assert all(stage.n_kept == stage.n_in for stage in sample.stages)
    for sides in ([4, 16], [2, 12, 1, 10, 6]):
        model.generate(**make_inputs(_prompt(sides)), max_new_tokens=1)
        (sample,) = state.report.samples
        assert sample.images == tuple(side * side for side in sides)
        check(state.report, 4)
        assert sum(sample.stages[-1].per_image) >= 32
        assert sample.average_in <= 0.4 * sum(sample.images)


def _prompt(sides):
    return [("text", 2), *[part for side in sides for part in (("image", side, side), ("text", 2))], ("text", 5)]


@pytest.mark.parametrize("prompt", MANY)
@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_both_paths_keep_the_same(selector, prompt):
    model, inputs = tiny_model(), inputs_of(prompt)
    for options in ({}, {"keep": 0.35, "min_keep_per_image": 9}, {"min_keep_per_image": 0}):
        state = apply_sparsevlm(model, **options_of(selector, **options))
        wanted, report = model.generate(**inputs, **GREEDY), state.report
        assert report.path == "plain"
        with state.options(engine=True):
            for _ in range(2):  # the second time by the programs of the first
                assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
                assert state.report.path == "engine"
                assert state.report.samples == report.samples


@pytest.mark.parametrize("selector", ["span", "random", "sparsevlm", "span-joint"])
def test_the_rank_decides_on_both_paths(selector):
    model, inputs = tiny_model(), inputs_of("a batch of one, two and three")
    # Not so few that all but one of the last are kept: of centred states the last two are then equally far off.
    state = apply_sparsevlm(model, **options_of(selector, keep=None, rank_lambda=0.8, rank_tolerance=0.3))
    wanted, report = model.generate(**inputs, **GREEDY), state.report
    assert not all(sample.budget_clamped is None for sample in report.samples) or selector == "sparsevlm"
    with state.options(engine=True):
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        assert state.report.samples == report.samples
    with state.options(rank_lambda=0.4):
        model.generate(**inputs, **GREEDY)
        check(state.report, 4)


@pytest.mark.parametrize("engine", [False, True])
def test_floors_that_are_more_than_the_budget(engine):
    """Of 52 tokens 10 go on, and two floors are 16 and 20."""
    model, inputs = tiny_model(), inputs_of("a blank image")
    options = {"min_keep": 3, "target_layers": [0], "schedule": [10], "engine": engine, "min_keep_per_image": 20}
    state = apply_sparsevlm(model, **options)
    for _ in range(3):
        model.generate(**inputs, **GREEDY)
        (sample,) = state.report.samples
        assert sample.stages[0].per_image == (5, 5)
        assert "visual tokens per image at the end: 5 of 16, 5 of 36" in str(state.report)
        assert sample.budget_clamped == (
            "min_keep_per_image=20 takes 36 tokens of 2 images, but 10 go on after layer 0: each image keeps an even "
            "share"
        )
    refused = pytest.raises(ValueError, match=r"each image keeps an even share \(strict=True refuses this\)")
    with refused, state.options(strict=True):
        model.generate(**inputs, **GREEDY)
    with state.options(keep=[0.9], schedule=None, strict=True):
        model.generate(**inputs, **GREEDY)
    assert min(state.report.samples[0].stages[0].per_image) >= 16


@pytest.mark.parametrize("engine", [False, True])
def test_strict_refuses_what_the_rank_leaves_too_little_of(engine):
    model, inputs = tiny_model(), inputs_of("a blank image")
    apply_sparsevlm(
        model, selector="span", min_keep=3, min_keep_per_image=16, rank_lambda=1.0, strict=True, engine=engine
    )
    with pytest.raises(ValueError, match=r"go on after layer 2: each image keeps an even share \(strict=True"):
        model.generate(**inputs, **GREEDY)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("prompt", ["one image", "video", "batch, left padding"])
@pytest.mark.parametrize("selector", ["span", "sparsevlm", "divprune"])
def test_one_image_keeps_what_it_kept(selector, prompt, engine):
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, **options_of(selector, engine=engine, min_keep_per_image=0))
    logits = {"return_dict_in_generate": True, "output_logits": True}
    wanted, report = model.generate(**inputs, **GREEDY, **logits), state.report
    with state.options(min_keep_per_image=30):
        found = model.generate(**inputs, **GREEDY, **logits)
    assert state.report.samples == report.samples
    assert all(torch.equal(one, other) for one, other in zip(found.logits, wanted.logits, strict=True))


def test_images_are_told_apart_without_ids():
    """Embeddings bring no ids: runs of placeholders are images."""
    model, inputs = tiny_model(), inputs_of("a blank image")
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**inputs, **GREEDY)
    wanted = state.report.samples[0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    positions, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
    given = {key: value for key, value in inputs.items() if key not in ("input_ids", "mm_token_type_ids")}
    with torch.no_grad():
        model(inputs_embeds=embeds, position_ids=positions, **given)
    (sample,) = state.report.samples
    assert sample.images == wanted.images == (16, 36)
    assert [stage.per_image for stage in sample.stages] == [stage.per_image for stage in wanted.stages]


def test_a_selector_is_told_which_image_a_row_is_of():
    class Looks:
        def __init__(self):
            self.seen = []

        def select(self, context, n_keep):
            self.seen.append((context.image_idx.tolist(), context.n_images, context.indices.tolist()))
            return torch.arange(context.n_visual - n_keep, context.n_visual)

    model, selector = tiny_model(), Looks()
    apply_sparsevlm(model, **OPTIONS, selector=selector, min_keep_per_image=0)
    model.generate(**inputs_of("a batch of one, two and three"), **GREEDY)
    sizes = [[30], [16, 36], [3, 36, 8]]
    for place, (images, n_images, indices) in enumerate(selector.seen):
        own = sizes[place % 3]
        assert n_images == len(own)
        assert images == torch.arange(len(own)).repeat_interleave(torch.tensor(own))[indices].tolist()
    assert len(selector.seen) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", MANY)
@pytest.mark.parametrize("min_keep", [4, 9])
def test_a_graph_chooses_as_the_plain_path(min_keep, prompt, monkeypatch):
    """With picks that do not hang on the last digits of the states."""

    def by_place(self, states, valid, n_keep):
        n = states.shape[1]
        score = (torch.arange(n, device=states.device) * 7919) % 1009
        return score.expand_as(valid).masked_fill(~valid, 2000 + n).argsort(dim=-1, stable=True)[:, :n_keep]

    def from_the_end(self, states, valid, n_keep):
        score = torch.arange(states.shape[1], 0, -1, device=states.device)
        return score.expand_as(valid).masked_fill(~valid, 9999).argsort(dim=-1, stable=True)[:, :n_keep]

    model = tiny_model().to("cuda", torch.bfloat16)
    inputs = {name: value.to("cuda") for name, value in inputs_of(prompt).items()}
    for order in (by_place, from_the_end):
        monkeypatch.setattr(SpanSelector, "order", order)
        state = apply_sparsevlm(model, **options_of("span", min_keep_per_image=min_keep, engine=False))
        model.generate(**inputs, **GREEDY)
        wanted = [[stage.kept for stage in sample.stages] for sample in state.report.samples]
        if not state.report.budget_clamped:
            check(state.report, min_keep)
        with state.options(engine=True):
            for _ in range(5):  # from the third time on by what was recorded
                model.generate(**inputs, **GREEDY)
                assert state.report.path == "engine"
                found = [[stage.kept for stage in sample.stages] for sample in state.report.samples]
                assert found == wanted
