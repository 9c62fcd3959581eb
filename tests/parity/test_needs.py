"""What selectors are given of attention equals whole softmax matrices: in the vision tower, and of the last token."""

from __future__ import annotations

import gc
import inspect

import flash_emulation
import pytest
import torch
import vision_reference
from oracle import masked_run
from runs import IMAGE_TURNS, all_dropped, take_second_turn
from runs import build as build_run

import toys
from covering import covering_array, factor_groups
from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.hooks import vision_hooks
from sparsevlm.hooks.attention_probe import AttentionProbe
from sparsevlm.hooks.vision_probe import VisionProbe
from sparsevlm.models import adapter_for
from sparsevlm.request.step import VisionRows
from sparsevlm.template import Template
from toys import IMAGE, PROMPTS, VIDEO, family_of, make_inputs, tiny_model, use_attention

VISION = ("vision_attention", "vision_keys")
VISION_ATTENTIONS = ("sdpa", "eager", vision_reference.FLASH)
# Depth and full-attention blocks such that middle and last are two blocks, and neither is the first or the only one.
TOWERS = {
    "qwen2_5_vl": {"depth": 5, "fullatt_block_indexes": [0, 2, 3]},
    "qwen2_vl": {"depth": 3},
    "qwen3_vl": {"depth": 5, "deepstack_visual_indexes": [0, 1, 3]},
    "qwen2_5_omni_thinker": {"depth": 5, "fullatt_block_indexes": [0, 2, 3]},
}
FAMILIES = tuple(TOWERS)
OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
TAKES_ENCODINGS = "mm_encoder_outputs" in inspect.signature(type(tiny_model()).forward).parameters


class Spy:
    """Drops tokens by a fixed draw and remembers every context."""

    def __init__(self, needs, placement="target_layers"):
        self.needs, self.placement = needs, placement
        self.seen = []

    def select(self, context, n_keep):
        self.seen.append(context)
        generator = torch.Generator().manual_seed(17 * context.layer + context.sample + 40)
        return torch.randperm(context.n_visual, generator=generator)[:n_keep].sort().values


def spied(placement="target_layers", needs=VISION):
    # Without floors, for which it would be asked once more.
    options = {**OPTIONS, "selector": Spy(needs, placement), "min_keep_per_image": 0}
    if placement == "before_decoder":
        del options["target_layers"]
    return options


def build(family, *rows, vision_attention="sdpa", place=None, seed=0):
    model = tiny_model(family, vision_options=TOWERS[family])
    vision_reference.sharpen(model)
    vision_reference.use_vision_attention(model, vision_attention)
    inputs = make_inputs(*rows, seed=seed, family=family)
    if place is not None:
        model = model.to(place.device, place.dtype)
        inputs = {name: value.to(place.device) for name, value in inputs.items()}
    return model, inputs


def assert_all_vision_is(contexts, n_contexts, wanted, tolerance=1e-5):
    assert len(contexts) == n_contexts
    for context in contexts:
        assert_vision_is(context, wanted, tolerance)


def assert_vision_is(context, wanted, tolerance=1e-5):
    (attention, keys), indices = wanted, context.indices.cpu()
    assert context.vision_attention.dtype == context.vision_keys.dtype == torch.float32
    torch.testing.assert_close(
        context.vision_attention.cpu(), attention[:, indices], rtol=tolerance, atol=tolerance / 100
    )
    torch.testing.assert_close(context.vision_keys.cpu(), keys[indices], rtol=tolerance, atol=tolerance)


TOWER_FACTORS = {
    "prompt": tuple(PROMPTS),
    "family": FAMILIES,
    "vision_attention": VISION_ATTENTIONS,
    "placement": ("target_layers", "before_decoder", "both"),
}
TOWER_CASES = covering_array(
    TOWER_FACTORS, factor_groups(TOWER_FACTORS, 2, ("prompt", "family", "vision_attention")), lambda case: True
)


@pytest.mark.parametrize(tuple(TOWER_FACTORS), [tuple(case.values()) for case in TOWER_CASES], ids=str)
def test_vision_tower(prompt, family, vision_attention, placement, place):
    model, inputs = build(family, *PROMPTS[prompt], vision_attention=vision_attention, place=place)
    if place.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    wanted = vision_reference.references_of_samples(model, inputs)
    options = spied(placement)
    state = apply_sparsevlm(model, **options, engine=False)
    contexts = options["selector"].seen
    # In half precision the engine rounds otherwise, which attention as sharp as this shows: other tests look there.
    runs = (
        vision_attention != vision_reference.FLASH and place.device == "cpu" and toys.FAMILIES[family].tower_on_engine
    )

    def on_engine():
        with state.options(engine=True):
            model.generate(**inputs, max_new_tokens=2)
            assert state.report.path == "engine"

    calls = [lambda: model.generate(**inputs, max_new_tokens=2), lambda: model(**inputs), *[on_engine] * runs]
    for call in calls:
        contexts.clear()
        call()
        layers = {"target_layers": {1, 3}, "before_decoder": {-1}, "both": {-1, 1, 3}}[placement]
        with_picture = {b for b, found in enumerate(wanted) if found is not None}
        assert with_picture
        assert {(c.layer, c.sample) for c in contexts} == {(layer, b) for layer in layers for b in with_picture}
        for context in contexts:
            exact = 1e-5 if call is not on_engine else 5e-5  # rounding of the whole tower is among it
            assert_vision_is(context, wanted[context.sample], exact if place.dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_read_in_float32(family, dtype):
    """The tower's own queries and keys are half precise; nothing made of them is."""
    model, inputs = build(family, *PROMPTS["one image"])
    model = model.to(dtype)
    (wanted,) = vision_reference.references_of_samples(model, inputs)
    options = spied(needs=(*VISION, "last_attention"))
    apply_sparsevlm(model, **options)
    model.generate(**inputs, max_new_tokens=1)
    assert_all_vision_is(options["selector"].seen, 2, wanted)
    assert {context.last_attention.dtype for context in options["selector"].seen} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_bites(family):
    """Blocks, order and images differ by more than the tolerance."""
    model, inputs = build(family, *PROMPTS["two images"])
    ((attention, keys),) = vision_reference.references_of_samples(model, inputs)
    for one, other in (
        (attention[0], attention[1]),
        (attention[1], attention[1].flip(0)),
        (keys, keys.flip(0)),
        (attention[1, :16], attention[1, 16:32]),
    ):
        assert float((one - other).abs().max() / one.abs().max()) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_is_one_on_average_in_every_image_and_frame(family):
    model, inputs = build(family, [("image", 6, 6), ("image", 2, 2), ("video", 2, 3, 4), ("text", 4)])
    options = spied("before_decoder")
    apply_sparsevlm(model, **options)
    model.generate(**inputs, max_new_tokens=1)
    (context,) = options["selector"].seen
    for part in context.vision_attention.split([36, 4, 12, 12], dim=1):
        torch.testing.assert_close(part.mean(dim=1), torch.ones(2))


@pytest.mark.parametrize("selector", ["visionzip", "hiprune", "scope"])
@pytest.mark.parametrize(
    ("row", "n_large", "n_small"),
    [
        ([("image", 20, 20), ("image", 6, 6), ("text", 4)], 400, 36),
        ([("image", 16, 16), ("video", 4, 6, 6), ("text", 4)], 256, 144),
    ],
    ids=["two images", "image and video"],
)
def test_a_large_image_is_not_starved_by_a_small_one(selector, row, n_large, n_small):
    model, inputs = tiny_model(), make_inputs(row)
    state = apply_sparsevlm(model, selector=selector, keep=0.2, min_keep=1)
    model.generate(**inputs, max_new_tokens=1)
    stage = state.report.samples[0].stages[0]
    kept = [*stage.kept, *stage.recycled]
    rate = len(kept) / (n_large + n_small)
    assert sum(index < n_large for index in kept) / n_large > 0.5 * rate


def test_order_of_windows_matters_here():
    model, _ = build("qwen2_5_vl", *PROMPTS["one image"])
    order = vision_reference.window_order(model, 1, 3, 5)
    assert order == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    adapter = adapter_for(model)
    found = adapter.family.reading_order(adapter, {"grid_thw": torch.tensor([[1, 6, 10]])})
    assert found.tolist() == order


def test_the_middle_of_one_block_is_that_block():
    model = tiny_model(vision_options={"depth": 3, "fullatt_block_indexes": [1]})
    vision_reference.sharpen(model)
    options = spied()
    apply_sparsevlm(model, **options)
    model.generate(**make_inputs(*PROMPTS["one image"]), max_new_tokens=1)
    first, second = options["selector"].seen[0].vision_attention
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("depth", "full", "middle"),
    [
        (32, [7, 15, 23, 31], 15),  # as in Qwen2.5-VL
        (6, [2, 5], 2),
        (4, [0, 1, 2, 3], 2),
        (3, [0, 1, 2], 1),
        (5, [0, 4], 4),
    ],
)
def test_the_middle_block_is_the_nearest_to_half_the_depth(depth, full, middle):
    model = tiny_model(vision_options={"depth": depth, "fullatt_block_indexes": full})
    state = apply_sparsevlm(model, **spied())
    probe = VisionProbe(state.adapter.vision, frozenset(VISION), None)
    armed = {block for _, block in state.adapter.vision.readable if block in AttentionProbe._armed}
    probe.disarm()
    assert armed == {model.model.visual.blocks[middle].attn, model.model.visual.blocks[full[-1]].attn}


@pytest.mark.parametrize("way", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", [name for name in FAMILIES if toys.FAMILIES[name].repeats == "samples"])
@pytest.mark.parametrize("prompt", ["two images", "batch, unequal counts", "image and video"])
def test_copies_of_a_sample_share_what_was_read(prompt, family, way):
    model, inputs = build(family, *PROMPTS[prompt])
    wanted = vision_reference.references_of_samples(model, inputs)
    options = spied("both")
    apply_sparsevlm(model, **options)
    copies = way.get("num_beams", 2)
    if prompt == "image and video":
        inputs.pop("second_per_grid_ts", None)
    model.generate(**inputs, max_new_tokens=2, **way)
    contexts = options["selector"].seen
    assert {c.sample // copies for c in contexts} == {b for b, found in enumerate(wanted) if found is not None}
    assert len({c.sample for c in contexts}) == copies * sum(found is not None for found in wanted)
    for context in contexts:
        assert_vision_is(context, wanted[context.sample // copies])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_needed_is_read(family):
    model, inputs = build(family, *PROMPTS["two images"])
    both = spied()
    apply_sparsevlm(model, **both)
    model.generate(**inputs, max_new_tokens=1)
    for need, other in (VISION, VISION[::-1]):
        options = spied(needs={need})
        apply_sparsevlm(model, **options)
        model.generate(**inputs, max_new_tokens=1)
        assert len(both["selector"].seen) == 2
        for got, wanted in zip(options["selector"].seen, both["selector"].seen, strict=True):
            assert torch.equal(getattr(got, need), getattr(wanted, need))
            assert getattr(got, other) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_without_cache_tokens_are_chosen_once(family):
    model, inputs = build(family, *PROMPTS["batch, unequal counts"])
    wanted = vision_reference.references_of_samples(model, inputs)
    options = spied()
    state = apply_sparsevlm(model, **options)
    model.generate(**inputs, max_new_tokens=3, use_cache=False)
    assert len(options["selector"].seen) == 2 * 2  # layers, samples with a picture
    for context in options["selector"].seen:
        assert_vision_is(context, wanted[context.sample])
    assert state.report.samples[1].grids == ((1, 3, 4), (1, 4, 4))
    options["selector"].seen.clear()
    assert not read_somewhere()


def test_prompt_lookup_and_a_second_turn():
    model, inputs = build("qwen2_5_vl", *PROMPTS["one image"])
    (first_wanted,) = vision_reference.references_of_samples(model, inputs)
    options = spied("both")
    apply_sparsevlm(model, **options)
    ways = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO], "return_dict_in_generate": True}
    first = model.generate(**inputs, **ways, prompt_lookup_num_tokens=2)
    assert_all_vision_is(options["selector"].seen, 3, first_wanted)
    options["selector"].seen.clear()
    turn = make_inputs([("text", 2), ("image", 3, 5), ("text", 3)], seed=8)
    (second_wanted,) = vision_reference.references_of_samples(model, turn)
    options["selector"].seen.clear()
    turn["input_ids"] = torch.cat([first.sequences, turn["input_ids"]], dim=1)
    for name in ("attention_mask", "mm_token_type_ids"):
        del turn[name]
    model.generate(**turn, **ways, past_key_values=first.past_key_values)
    assert_all_vision_is(options["selector"].seen, 3, second_wanted)


def read_somewhere():
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (VisionRows, VisionProbe)]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_after_the_prefill(family):
    model, inputs = build(family, *PROMPTS["two images"])
    options = spied()
    state = apply_sparsevlm(model, **options)
    configs = [id(block.config) for _, block in state.adapter.vision.readable]
    kept = []

    def look(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == 1:
            options["selector"].seen.clear()
            kept.append(read_somewhere())

    handle = family_of(model).decoder_of(model).register_forward_pre_hook(look, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=3)
    handle.remove()
    assert kept == [[], []]
    assert not AttentionProbe._armed
    assert [id(block.config) for _, block in state.adapter.vision.readable] == configs


def test_nothing_is_read_for_a_selector_that_does_not_need_it(monkeypatch):
    def refuse(*args):
        raise AssertionError("the vision tower is probed")

    monkeypatch.setattr(vision_hooks, "VisionProbe", refuse)
    model, inputs = build("qwen2_5_vl", *PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**inputs, max_new_tokens=2)
    with state.options(selector=Spy(VISION)), pytest.raises(AssertionError, match="is probed"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("attn", VISION_ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["image and video", "batch, unequal counts"])
def test_reading_changes_no_bit(prompt, family, attn):
    model, inputs = build(family, *PROMPTS[prompt], vision_attention=attn)
    if prompt == "image and video":
        inputs.pop("second_per_grid_ts", None)
    ways = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    dense = model.generate(**inputs, **ways)
    for needs in (VISION, (*VISION, "last_attention")):
        apply_sparsevlm(model, **{**OPTIONS, "keep": 1.0, "selector": Spy(needs, "both")})
        kept_all = model.generate(**inputs, **ways)
        assert all(torch.equal(a, b) for a, b in zip(kept_all.logits, dense.logits, strict=True))
    drawn = []
    for needs in ((), (*VISION, "last_attention")):  # pruning, with reading and without
        apply_sparsevlm(model, **{**OPTIONS, "selector": Spy(needs, "both")})
        drawn.append(model.generate(**inputs, **ways))
    assert all(torch.equal(a, b) for a, b in zip(drawn[0].logits, drawn[1].logits, strict=True))
    assert not torch.equal(drawn[0].logits[0], dense.logits[0])
    remove_sparsevlm(model)
    again = model.generate(**inputs, **ways)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, dense.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_the_tower_leaves_it_as_it_was(family, error):
    model, inputs = build(family, *PROMPTS["two images"])
    options = spied()
    state = apply_sparsevlm(model, **options)
    wanted = model.generate(**inputs, max_new_tokens=3)
    contexts = list(options["selector"].seen)
    blocks = [block for _, block in state.adapter.vision.readable]
    configs = [block.config for block in blocks]

    def fail(module, args):
        raise error("a block failed")

    tower = state.adapter.vision.module
    for place in (next(blocks[-1].children()), blocks[-1].proj, tower.merger, tower.patch_embed):
        for call in (lambda: model.generate(**inputs, max_new_tokens=3), lambda: model(**inputs)):
            handle = place.register_forward_pre_hook(fail)
            with pytest.raises(error, match="a block failed"):
                call()
            handle.remove()
            if error is KeyboardInterrupt:  # torch calls no hook then: the next run or the removal cleans up
                continue
            assert not AttentionProbe._armed
            assert all(a.config is b for a, b in zip(blocks, configs, strict=True))
    with state.options(selector="random"):
        model.generate(**inputs, max_new_tokens=1)
        assert not AttentionProbe._armed
    options["selector"].seen.clear()
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), wanted)
    assert len(contexts) == 2
    for got, before in zip(options["selector"].seen, contexts, strict=True):
        assert torch.equal(got.vision_attention, before.vision_attention)
    handle = next(blocks[-1].children()).register_forward_pre_hook(fail)
    with pytest.raises(error, match="a block failed"):
        model.generate(**inputs, max_new_tokens=3)
    handle.remove()
    remove_sparsevlm(model)
    assert not AttentionProbe._armed
    assert all(a.config is b for a, b in zip(blocks, configs, strict=True))


def test_no_block_with_full_attention():
    model = tiny_model(vision_options={"fullatt_block_indexes": []})
    with pytest.raises(NotImplementedError, match=r"needs vision_keys, which .* has none"):
        apply_sparsevlm(model, **spied(needs={"vision_keys"}))
    apply_sparsevlm(model, **spied(needs=()))


@pytest.mark.skipif(not TAKES_ENCODINGS, reason="these transformers take no encodings")
def test_features_given_ready_made_are_refused():
    model, inputs = build("qwen2_5_vl", *PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**inputs, max_new_tokens=3)
    pixels, grid = inputs.pop("pixel_values"), inputs["image_grid_thw"]

    def encoded():
        with torch.no_grad():
            return {"mm_encoder_outputs": {"image": model.model.get_image_features(pixels, grid)}}

    foreign = encoded()  # while the selector in force needs nothing of the tower
    assert torch.equal(model.generate(**inputs, **foreign, max_new_tokens=3), wanted)
    options = spied()
    with state.options(selector=options["selector"]):
        for call in (model.generate, model):
            with pytest.raises(ValueError, match="needs vision_attention, vision_keys, but these image features were"):
                call(**inputs, **foreign)
        with state.options(keep=1.0):  # nothing is asked of the selector
            model.generate(**inputs, **foreign, max_new_tokens=2)
        assert not options["selector"].seen
        ours = encoded()
        model.generate(**inputs, **ours, max_new_tokens=2)
        assert len(options["selector"].seen) == 2
        with pytest.raises(ValueError, match="Pass pixel_values instead"):  # read once, for one prefill
            model.generate(**inputs, **ours, max_new_tokens=2)
    assert not AttentionProbe._armed
    assert torch.equal(model.generate(**inputs, **foreign, max_new_tokens=3), wanted)


@pytest.mark.skipif(not TAKES_ENCODINGS, reason="these transformers take no encodings")
def test_an_encoding_is_known_by_itself_not_by_its_turn():
    model, inputs = build("qwen2_5_vl", *PROMPTS["one image"])
    other = make_inputs(*PROMPTS["one image"], seed=5)
    (wanted,) = vision_reference.references_of_samples(model, inputs)
    options = spied()
    apply_sparsevlm(model, **options)
    with torch.no_grad():
        ours, later = (model.model.get_image_features(x["pixel_values"], x["image_grid_thw"]) for x in (inputs, other))
    inputs.pop("pixel_values")
    model.generate(**inputs, mm_encoder_outputs={"image": ours}, max_new_tokens=2)
    assert_all_vision_is(options["selector"].seen, 2, wanted)
    del later


@pytest.mark.parametrize("attn", ["sdpa", "eager", flash_emulation.NAME])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_attention_of_single_tokens(prompt, family, attn, place):
    """Of the prompt's last, and of the one right behind the last visual one."""
    flash_emulation.register()
    model, inputs = build(family, *PROMPTS[prompt], place=place)
    use_attention(model, attn)
    options = {**spied("both", ("last_attention", "prior_attention")), "keep": 0.5}
    state = apply_sparsevlm(model, **options)
    model.generate(**inputs, max_new_tokens=2)
    contexts, report = options["selector"].seen, state.report
    assert {context.layer for context in contexts} == {-1, 1, 3}
    state.detach()
    use_attention(model, "eager")
    attentions = masked_run(
        model, inputs, inputs["input_ids"], all_dropped(report, len(report.samples)), output_attentions=True
    ).attentions
    tolerance = 1e-5 if place.dtype == torch.float32 else 0.1
    for context in contexts:
        if context.layer < 0:
            assert context.last_attention is None
            assert context.prior_attention is None
            continue
        positions = report.samples[context.sample].visual_positions
        visual = torch.tensor(positions)[context.indices.cpu()]
        whole = attentions[context.layer][context.sample].float().mean(dim=0).cpu()
        text = sorted({*range(int(visual[-1]), whole.shape[0])} - {*positions})
        for found, row in ((context.last_attention, -1), (context.prior_attention, text[0] if text else -1)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.cpu(), whole[row, visual], rtol=tolerance, atol=tolerance / 100)


def test_last_token_of_the_prompt_is_no_guess_no_padding_and_may_be_the_templates():
    model, inputs = build("qwen2_5_vl", [("text", 8), ("image", 4, 6), ("text", 9)])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, 2:6]  # something to look up: a guess from the first step on
    suffix = tuple(inputs["input_ids"][0, -2:].tolist())
    options = spied("target_layers", ("last_attention", "rater_attention"))
    state = apply_sparsevlm(model, **options)
    seen = []
    for more in ({}, {"prompt_lookup_num_tokens": 3}):
        for state._template in (Template(), Template(suffix=suffix)):
            options["selector"].seen.clear()
            model.generate(**inputs, max_new_tokens=3, **more)
            seen.append([context.last_attention for context in options["selector"].seen])
    assert [len(one) for one in seen] == [2] * 4
    for other in seen[1:]:
        for got, wanted in zip(other, seen[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    of_tokens = ("input_ids", "attention_mask", "mm_token_type_ids")
    right_padded = {
        name: torch.nn.functional.pad(value, (0, 3)) if name in of_tokens else value for name, value in inputs.items()
    }
    options["selector"].seen.clear()
    with torch.no_grad():
        model(**right_padded)
    torch.testing.assert_close(options["selector"].seen[0].last_attention, seen[0][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attn", ["sdpa", "eager", flash_emulation.NAME])
@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_attention_of_a_second_turn(prompt, attn, place):
    """The keys of the first turn, of which some are gone, come before those that are judged."""
    spy = Spy(("last_attention", "rater_attention"))
    run = build_run(PROMPTS[prompt], {**OPTIONS, "selector": spy, "raters": "all"}, place, attention=attn)
    turn = take_second_turn(run, IMAGE_TURNS[0])
    report, contexts = run.state.report, spy.seen[-2 * run.batch :]
    rater_candidates = [sample.rater_candidates.tolist() for sample in run.state._session.request.samples]
    assert {(context.layer, context.sample) for context in contexts} == {
        (layer, b) for layer in (1, 3) for b in range(run.batch)
    }
    run.state.detach()
    use_attention(run.model, "eager")
    ids = turn.inputs["input_ids"]
    attentions = masked_run(
        run.model, turn.inputs, ids, turn.dropped, turn.positions[..., : ids.shape[1]], output_attentions=True
    ).attentions
    tolerance = 1e-5 if place.dtype == torch.float32 else 0.1
    for context in contexts:
        b, past_len = context.sample, turn.past_len
        visual = past_len + torch.tensor(report.samples[b].visual_positions)[context.indices.cpu()]
        whole = attentions[context.layer][b].float().mean(dim=0).cpu()
        rows = past_len + torch.tensor(rater_candidates[b])
        assert len(rows) > 1
        for found, wanted in ((context.last_attention, whole[-1]), (context.rater_attention, whole[rows])):
            torch.testing.assert_close(found.cpu(), wanted[..., visual], rtol=tolerance, atol=tolerance / 100)


def test_last_attention_leaves_the_raters_attention_as_it_is():
    model, inputs = build("qwen2_5_vl", *PROMPTS["batch, unequal counts"])
    read = []
    for needs in (("rater_attention",), ("rater_attention", "last_attention")):
        options = spied(needs=needs)
        apply_sparsevlm(model, **options)
        model.generate(**inputs, max_new_tokens=1)
        read.append([context.rater_attention for context in options["selector"].seen])
    assert [len(one) for one in read] == [4, 4]  # two layers, two samples with a picture
    assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))


@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_visual_heads_are_those_of_whole_matrices(prompt):
    """Four heads: the two with the most mass from the rows that vote to the visual tokens."""
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    use_attention(model, "eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    options = spied(needs=("rater_attention",))
    state = apply_sparsevlm(model, **options, heads="visual")
    model.generate(**inputs, max_new_tokens=1)
    first = [context for context in options["selector"].seen if context.layer == 1]
    assert len(first) == len(PROMPTS[prompt]) - (prompt == "batch, unequal counts")  # one has no picture
    for context in first:
        sample = state._session.request.samples[context.sample]
        whole = attentions[1][context.sample][:, sample.rater_candidates][:, :, sample.visual]
        heads = whole.sum(dim=(1, 2)).topk(2).indices
        wanted = whole[heads].mean(dim=0)
        raters = wanted.sum(dim=1) >= wanted.sum(dim=1).mean()
        torch.testing.assert_close(context.rater_attention, wanted[raters], rtol=1e-5, atol=1e-7)
        assert not torch.allclose(wanted, whole.mean(dim=0), rtol=1e-2)
