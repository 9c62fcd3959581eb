"""A vision tower that leaves out what looks like everything around it."""

from __future__ import annotations

import pytest
import torch
from test_parity import run
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from sparsevlm import apply_sparsevlm
from sparsevlm.engine.vision.patch_pruning import (
    ChoiceInputs,
    choose,
    n_choice_integers,
    n_kept,
    neighbours,
    patch_saliency,
)
from sparsevlm.engine.vision.tables import VisionInputs, host_tables, n_integers
from sparsevlm.selection.selectors import SpanFeaturesSelector
from toys import PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "engine": True}
PICTURES = ["one image", "two images", "batch, left padding", "video"]


def test_what_differs_from_a_neighbour_is_novel():
    tokens = torch.zeros(5 * 6, 4)
    tokens[2 * 6 + 3] = 2.0
    found = patch_saliency(tokens, neighbours(((1, 5, 6),))).view(5, 6)
    near = torch.zeros(5, 6, dtype=torch.bool)
    near[2, 3] = near[1, 3] = near[3, 3] = near[2, 2] = near[2, 4] = True
    assert torch.equal(found, near * 2.0)


def test_in_a_video_what_stays_is_not_novel():
    frames = torch.randn(3, 4 * 4, 5, generator=torch.Generator().manual_seed(0))
    frames[1] = frames[0]
    frames[1, 7] += 1.0
    found = patch_saliency(frames.flatten(0, 1), neighbours(((3, 4, 4),))).view(3, 16)
    assert (found[0] > 0).all()
    assert found[1].nonzero().tolist() == [[7]]
    assert (found[2] > 0).all()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 1.0])
def test_the_choice_keeps_its_numbers_and_orders(share):
    grids, per_token = ((1, 4, 6), (2, 2, 4)), 4
    tables = host_tables(2, 4, grids)
    shape = tables.shape()
    numbers = n_kept(grids, share)
    assert numbers == [max(1, round(share * 24)), max(1, round(share * 16))]
    n_tokens, number = shape.patches // per_token, sum(numbers)
    of_kept = shape.only(number * per_token)

    def room(n):
        return torch.zeros(n, dtype=torch.int64)

    whole = VisionInputs.of(shape, per_token, room(n_integers(shape, per_token)))
    part = VisionInputs.of(of_kept, per_token, room(n_integers(of_kept, per_token)))
    choice = ChoiceInputs.of(n_tokens, 2, room(n_choice_integers(n_tokens, 2)))
    whole.fill(tables, shape)
    choice.fill(grids, numbers)
    tokens = torch.randn(n_tokens, 3, generator=torch.Generator().manual_seed(1))
    kept = choose(tokens, choice, whole, part, of_kept)[:number]
    assert [int((kept < 24).sum()), int((kept >= 24).sum())] == numbers
    assert kept.tolist() == sorted(set(kept.tolist()))
    working = [token for token in tables.order.tolist() if token in kept.tolist()]
    assert part.order[:number].tolist() == working
    assert torch.equal(part.order[part.back[:number]], kept)
    places = [place for place, token in enumerate(tables.order.tolist()) if token in kept.tolist()]
    of_patches = tables.positions.view(-1, per_token, 2)
    assert torch.equal(part.positions.view(-1, per_token, 2)[:number], of_patches[places])
    assert part.n_patches.tolist() == [number * per_token]
    for own, starts in ((part.frames, tables.frames), (part.windows, tables.windows)):
        left = [per_token * sum(place < start // per_token for place in places) for start in starts.tolist()]
        assert own[: len(left)].tolist() == left
        assert own[-1] == of_kept.patches
        assert (own.diff() >= 0).all()
        longest = of_kept.longest_frame if own is part.frames else of_kept.longest_window
        assert own.diff().max() <= longest


def test_floors_bind_in_the_tower():
    one, two = [(1, 5, 6)], [(1, 5, 6), (2, 2, 5), (1, 1, 2)]
    assert n_kept(one, 0.1) == [3]
    assert n_kept(one, 0.1, min_keep=20, min_keep_per_image=30) == [20]
    assert n_kept(one, 0.1, min_keep=40) == [30]
    assert n_kept(two, 0.1, min_keep_per_image=4) == [4, 4, 2]
    # 26 of 52: 15, 10 and 1; of 27 the parts are 15.6, 10.4 and 1.04.
    assert n_kept(two, 0.1, min_keep=26) == [15, 10, 1]
    assert n_kept(two, 0.1, min_keep=27) == [16, 11, 2]
    assert n_kept(two, 1.0, min_keep=27) == [30, 20, 2]


def by_the_modules(model, adapter, pixels, grids, kept):
    """The model's own blocks over the patches that are left, window by window."""
    tower, per_token = model.model.visual, adapter.vision.patches_per_token
    windows = adapter.vision.program.window is not None
    order = torch.arange(len(pixels) // per_token)
    starts = frames = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0]).cumsum(0).tolist()
    if windows:
        order, starts = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
        starts = torch.as_tensor(starts).tolist()[1:]
    stays = torch.isin(order, kept).repeat_interleave(per_token)
    hidden = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed"):
        index, weight = get_vision_interpolation_indices_and_weights(grids, 6, align_corners=True, spatial_merge_size=2)
        hidden = hidden + (tower.pos_embed(index) * weight[..., None]).sum(1)
    hidden = hidden.unflatten(0, (-1, per_token))[order].flatten(0, 1)[stays]
    position_ids = get_vision_position_ids(grids, tower.spatial_merge_size)
    cos, sin = tower.rotary_pos_emb(hidden, position_ids)
    cos, sin = (t.unflatten(0, (-1, per_token))[order].flatten(0, 1)[stays] for t in (cos, sin))

    def cu_seqlens(ends):
        return torch.tensor([0, *(int(stays[:end].sum()) for end in ends)]).unique().to(torch.int32)

    late = []
    for index, block in enumerate(tower.blocks):
        full = index in dict(adapter.vision.readable)
        hidden = block(hidden, cu_seqlens=cu_seqlens(frames if full else starts), position_embeddings=(cos, sin))
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            late.append(tower.deepstack_merger_list[len(late)](hidden))
    in_reading_order = torch.argsort(order[torch.isin(order, kept)])
    return [tokens[in_reading_order] for tokens in (tower.merger(hidden), *late)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("prompt", PICTURES)
def test_what_is_left_is_computed_in_its_windows(prompt, family):
    model, inputs = tiny_model(family), make_inputs(*PROMPTS[prompt])
    kind = "image" if "pixel_values" in inputs else "video"
    pixels = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
    state = apply_sparsevlm(model, **OPTIONS, keep=1.0, vision_keep=0.5)
    engine = state._engine
    with torch.no_grad():
        engine._runner.quick_check()
        grids = inputs[f"{kind}_grid_thw"]
        for factor in (3, 2, 4, 1):  # the last two by what was recorded
            own = tuple(state.adapter.family.grids(state.adapter, kind, inputs))
            seen = engine._runner.vision(pixels * factor, own, tuple(n_kept(own, 0.5)))
        wanted = by_the_modules(model, state.adapter, pixels, grids, seen.kept)
    assert 0 < len(seen.kept) < len(pixels) // state.adapter.vision.patches_per_token
    assert len(wanted) == (4 if family == "qwen3_vl" else 1)
    torch.testing.assert_close([seen.tokens, *seen.late], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", PICTURES)
def test_the_decoder_never_sees_the_rest(prompt):
    """Its logits are those of the prompt without the tokens that were left out, at their own positions."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, **OPTIONS, keep=1.0, vision_keep=0.5)
    _, (found,) = run(model, inputs, 1)
    report = state.report
    assert report.path == "engine"
    kind = "image" if "pixel_values" in inputs else "video"
    ids = inputs["input_ids"]
    grids = tuple(state.adapter.family.grids(state.adapter, kind, inputs))
    features = state._engine._runner.vision(
        inputs["pixel_values" if kind == "image" else "pixel_values_videos"], grids, tuple(n_kept(grids, 0.5))
    ).tokens
    given = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    positions, _ = model.model.get_rope_index(**given)
    start = 0
    for b, sample in enumerate(report.samples):
        assert [stage.layer for stage in sample.stages] == [-1, 0, 2]
        assert sample.stages[0].n_kept == sample.layer_tokens[0] == sample.final_tokens < sample.n_visual
        visual = torch.tensor(sample.visual_positions)
        stays = inputs["attention_mask"][b].bool()
        stays[visual] = False
        kept = visual[list(sample.stages[0].kept)]
        stays[kept] = True
        embeds = model.get_input_embeddings()(ids[b])
        embeds[kept] = features[start : start + len(kept)]
        start += len(kept)
        with torch.no_grad():
            hidden = model.model.language_model(
                inputs_embeds=embeds[stays][None], position_ids=positions[:, b : b + 1, stays]
            )[0]
            wanted = model.lm_head(hidden[:, -1])
        finite = found[b].isfinite()
        assert relative_error(found[b][finite], wanted[0][finite]) < 1e-5
    assert start == len(features)


@pytest.mark.parametrize("selector", ["span", "random"])
def test_budgets_hold_in_tokens_of_the_whole_picture(selector):
    model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 12, 16), ("text", 9)])
    state = apply_sparsevlm(model, **OPTIONS, selector=selector, keep=0.4, vision_keep=0.5)
    for _ in range(4):
        run(model, inputs, 3)
        (sample,) = state.report.samples
        assert (sample.n_visual, sample.layer_tokens[0]) == (192, 96)
        assert 0.4 * 192 - 1 < sample.average_in <= 0.4 * 192
        kept = [set(stage.kept) for stage in sample.stages]
        assert kept[0] >= kept[1]


def test_the_cap_of_a_free_choice_is_a_share_of_what_the_tower_leaves():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    selector = SpanFeaturesSelector(unexplained=0.0)  # as many as it may
    state = apply_sparsevlm(model, selector=selector, vision_keep=0.5, min_keep=1, engine=True)
    model.generate(**inputs, max_new_tokens=1)
    (sample,) = state.report.samples
    assert state.report.path == "engine"
    assert [(stage.n_in, stage.n_kept) for stage in sample.stages] == [(24, 12), (12, 6)]


def test_the_plain_path_computes_all():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, keep=0.6)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    wanted = model.generate(**inputs, **options)
    with state.options(vision_keep=0.5):
        assert torch.equal(model.generate(**inputs, **options), wanted)
        assert state.report.path == "plain"
        assert "the tower computed all" in state.report.path_reason
        assert [stage.layer for stage in state.report.samples[0].stages] == [0, 2]


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (0.0, ValueError), (1.5, ValueError), (True, TypeError), ("half", TypeError)]
)
def test_bad_shares(value, error):
    with pytest.raises(error, match="vision_keep must be"):
        apply_sparsevlm(tiny_model(), **OPTIONS, vision_keep=value)


TWO = [("text", 2), ("image", 5, 6), ("text", 4), ("image", 1, 3), ("text", 2), ("image", 4, 4), ("text", 5)]


def test_min_keep_and_the_budget_bind_in_the_tower():
    model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 5, 6), ("text", 9)])
    options = {**OPTIONS, "keep": 0.9, "vision_keep": 0.1, "min_keep": 20}
    state = apply_sparsevlm(model, **options)
    run(model, inputs, 2)
    (sample,) = state.report.samples
    assert (state.report.path, sample.layer_tokens, sample.final_tokens) == ("engine", (20,) * 6, 20)
    assert sample.budget_clamped == (
        "vision_keep=0.1 asks for 3 of 30 visual tokens, fewer than min_keep=20 allow: 20 are computed; keep=0.9 (27.0 "
        "tokens on average) is more than the 20 of 30 visual tokens that vision_keep=0.1 leaves: all of these are kept"
    )
    for refused, changes in (("asks for 3 of 30", {}), ("is more than the 20 of 30", {"vision_keep": 0.67})):
        with (
            pytest.raises(ValueError, match=rf"{refused} .*strict=True refuses this"),
            state.options(strict=True, **changes),
        ):
            run(model, inputs, 2)
    with state.options(strict=True, vision_keep=0.8, keep=0.8):
        run(model, inputs, 2)
        assert state.report.samples[0].budget_clamped is None
    with state.options(keep=0.6, min_keep=30):
        run(model, inputs, 2)
        assert state.report.samples[0].stages[0].skipped_because == "budget and floors keep every visual token here"


def test_a_schedule_asks_for_more_than_the_tower_leaves():
    model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 5, 6), ("text", 9)])
    state = apply_sparsevlm(model, **OPTIONS, schedule=[25, 10], vision_keep=0.5)
    run(model, inputs, 2)
    assert state.report.samples[0].budget_clamped == (
        "schedule (25, 10) asks for more than the 15 of 30 visual tokens that vision_keep=0.5 leaves: (15, 10) used"
    )
    with state.options(schedule=None, keep=25):
        run(model, inputs, 2)
        assert (
            "keep=25 (25.0 tokens on average) is more than the 15 of 30 visual tokens"
            in state.report.samples[0].budget_clamped
        )


def test_every_image_keeps_its_floor_in_the_tower_and_behind():
    model, inputs = tiny_model(), make_inputs(TWO, [("text", 3), ("image", 6, 6), ("text", 9)])
    state = apply_sparsevlm(model, **OPTIONS, schedule=[0.14, 0.1], vision_keep=0.15)
    for _ in range(4):  # from the third time on by what was recorded
        run(model, inputs, 3)
        assert state.report.path == "engine"
        first, second = state.report.samples
        assert first.images == (30, 3, 16)
        assert [stage.per_image for stage in first.stages] == [(4, 3, 4), (3, 2, 2), (2, 2, 1)]
        assert (
            "asks for 7 of 49 visual tokens, fewer than min_keep=3 and min_keep_per_image=4 allow: 11 are computed"
            in (first.budget_clamped)
        )
        assert "min_keep_per_image=4 takes 11 tokens of 3 images, but 7 go on after layer 0" in first.budget_clamped
        assert [stage.per_image for stage in second.stages] == [(5,), (5,), (4,)]
        assert second.budget_clamped is None
