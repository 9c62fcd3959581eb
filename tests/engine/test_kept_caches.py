"""Turns on a kept cache: what was computed before is taken out of it, and what is new put into it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from toys import FAMILIES, IMAGE, PROMPTS, VIDEO, make_inputs, runs_on_engine, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
GREEDY["suppress_tokens"] = [IMAGE, VIDEO]  # an answer that has placeholders is no prompt
CHOICES = {
    "span": {},
    "fastv": {"selector": "fastv", "target_layers": None},
    "divprune": {"selector": "divprune", "target_layers": None},
    "rank": {"keep": None},
    "embedding raters": {"selector": "sparsevlm", "raters": "embedding"},
    "dense": {"keep": 1.0},
}
LATER = {
    "the same": {},
    "other layers": {"selector": "span", "target_layers": [1, 3], "keep": 0.7},
    "before the decoder": {"selector": "divprune", "target_layers": None, "keep": 0.5},
    "by the tower": {"selector": "visionzip", "target_layers": None, "keep": 0.5},
    "dense": {"keep": 1.0},
}
TURNS = {
    "text": [("text", 6)],
    "image": [("text", 2), ("image", 4, 5), ("text", 4)],
    "images": [("image", 2, 2), ("text", 2), ("image", 4, 5), ("text", 4)],
}


def behind(ids, mask, *rows, seed=9, family="qwen2_5_vl"):
    """Inputs of a turn behind all tokens so far."""
    more = make_inputs(*rows, seed=seed, family=family)
    more.pop("mm_token_type_ids", None)
    before = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    mask = torch.cat([before, more["attention_mask"]], dim=1)
    return {**more, "attention_mask": mask, "input_ids": torch.cat([ids, more["input_ids"]], dim=1)}


def conversation(model, state, engines, prompt, *turns, change=lambda inputs: inputs, later=None):
    """Outputs and reports of turns, each on the engine or not, those behind the first under options ``later``."""
    family = model.config.model_type
    inputs, ids, cache, found = make_inputs(*PROMPTS[prompt], family=family), None, None, []
    for engine, turn in zip(engines, (None, *turns), strict=True):
        if cache is not None:
            inputs = behind(ids, inputs["attention_mask"], *[TURNS[turn]] * len(ids), family=family)
            inputs["past_key_values"] = cache
        ids, inputs = inputs["input_ids"], change(inputs)
        with state.options(engine=engine, **((later or {}) if cache is not None else {})):
            output = model.generate(**inputs, **GREEDY)
        cache = cache_of(output)
        ids = torch.cat([ids, output.sequences[:, inputs["input_ids"].shape[1] :]], dim=1)
        found.append((output, state.report))
    return found


def check(found, wanted):
    for (one, own), (other, theirs) in zip(found, wanted, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
        assert own.samples == theirs.samples
        assert (own.decode_steps, own.flops, own.skipped_because) == (
            theirs.decode_steps, theirs.flops, theirs.skipped_because,
        )  # fmt: skip
        assert (own.kv_bytes.dense, own.past_kv_bytes.dense) == (theirs.kv_bytes.dense, theirs.past_kv_bytes.dense)
        caches = cache_of(one), cache_of(other)
        for layers in zip(*(cache.layers for cache in caches), strict=True):
            tables = [getattr(layer, "table", None) for layer in layers]
            assert (tables[0] is None) == (tables[1] is None)
            assert layers[0].get_seq_length() == layers[1].get_seq_length()
            if tables[0] is not None:
                assert torch.equal(*(table.slots(table.appended) for table in tables))


def possible(case):
    reads_tower = case["later"] == "by the tower"
    return runs_on_engine(case) and (FAMILIES[case["family"]].tower_on_engine or not reads_tower)


@parametrize_pairs(
    possible,
    family=["qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "internvl"],
    prompt=["one image", "batch, left padding", "batch, unequal counts"],
    choice=list(CHOICES),
    turns=[("text", "text"), ("image", "text"), ("text", "image"), ("images", "image")],
    engines=[(True, True, True), (True, False, True), (False, True, False)],
    later=list(LATER),
)
def test_turns(family, prompt, choice, turns, engines, later):
    model = tiny_model(family)
    state = apply_sparsevlm(model, **{**OPTIONS, **CHOICES[choice]})
    found = conversation(model, state, engines, prompt, *turns, later=LATER[later])
    for (_, report), engine in zip(found, engines, strict=True):
        assert engine == (report.path == "engine")
    check(found, conversation(model, state, (False,) * 3, prompt, *turns, later=LATER[later]))


def new_alone(inputs):
    """Only what is new of the tokens, with the mask of all."""
    cache = inputs.get("past_key_values")
    return inputs if cache is None else {**inputs, "input_ids": inputs["input_ids"][:, cache.get_seq_length() :]}


def unequal(inputs):
    """New text of unequal lengths."""
    if "past_key_values" not in inputs:
        return inputs
    mask = inputs["attention_mask"].clone()
    mask[0, -5:-2] = 0
    return {**inputs, "attention_mask": mask}


def cropped(inputs):
    """The last answer is taken back in part."""
    if "past_key_values" in inputs:
        inputs["past_key_values"].crop(-2)
    return inputs


@pytest.mark.parametrize("change", [new_alone, unequal, cropped])
@pytest.mark.parametrize("turns", [("text", "image"), ("image", "text")])
def test_turns_as_transformers_takes_them(turns, change):
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    found = conversation(model, state, (True,) * 3, "batch, left padding", *turns, change=change)
    assert all(report.path == "engine" for _, report in found)
    check(found, conversation(model, state, (False,) * 3, "batch, left padding", *turns, change=change))


def test_a_cache_of_before_and_calls_in_between():
    model = tiny_model()
    inputs, other = make_inputs(*PROMPTS["one image"]), make_inputs(*PROMPTS["batch, unequal counts"])
    wanted = model.generate(**inputs, **GREEDY)
    more = behind(wanted.sequences, inputs["attention_mask"], TURNS["text"])
    answer = model.generate(**more, **GREEDY, past_key_values=copy.deepcopy(cache_of(wanted))).sequences
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    found = model.generate(**more, **GREEDY, past_key_values=cache_of(wanted))
    assert torch.equal(found.sequences, answer)
    assert (state.report.path, state.report.skipped_because) == ("engine", "no image or video in the input")
    assert state.report.kv_bytes.sparse == state.report.kv_bytes.dense > 0
    first = model.generate(**inputs, **GREEDY)
    kept, deltas = copy.deepcopy(cache_of(first)), model.model.rope_deltas
    more = behind(first.sequences, inputs["attention_mask"], TURNS["text"])
    answer = model.generate(**more, **GREEDY, past_key_values=cache_of(first)).sequences
    model.generate(**other, **GREEDY)
    model.model.rope_deltas = deltas  # of the last prompt, whatever cache is given: that is transformers' own
    assert torch.equal(model.generate(**more, **GREEDY, past_key_values=kept).sequences, answer)


@pytest.mark.parametrize("why", ["samples", "several answers", "dtype", "filled in part"])
def test_turns_that_are_left_to_the_hooks(why):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    first = model.generate(**inputs, **GREEDY)
    more, cache, options = (
        behind(first.sequences, inputs["attention_mask"], TURNS["text"]),
        cache_of(first),
        dict(GREEDY),
    )
    if why == "samples":
        cache.batch_repeat_interleave(2)
    elif why == "several answers":
        options["num_return_sequences"], options["do_sample"] = 2, True
    elif why == "dtype":
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
    else:
        cache.layers[3:] = DynamicCache(config=model.config).layers[3:]
    with contextlib.suppress(RuntimeError, AttributeError, IndexError):  # as in transformers
        model.generate(**more, **options, past_key_values=cache)
    assert why in state._engine.reason
    model.generate(**inputs, **GREEDY)
    assert state.report.path == "engine"


@pytest.mark.parametrize("turn", ["text", "image"])
def test_a_turn_that_fails_leaves_the_cache_as_it_was(turn):
    def fails(input_ids, scores):
        if input_ids.shape[1] > more["input_ids"].shape[1] + 1:
            raise ValueError("too late")
        return scores

    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **OPTIONS, engine=True)
    first = model.generate(**inputs, **GREEDY)
    more = behind(first.sequences, inputs["attention_mask"], TURNS[turn])
    answer = model.generate(**more, **GREEDY, past_key_values=copy.deepcopy(cache_of(first))).sequences
    with pytest.raises(ValueError, match="too late"):
        model.generate(**more, **GREEDY, past_key_values=cache_of(first), logits_processor=[fails])
    assert torch.equal(model.generate(**more, **GREEDY, past_key_values=cache_of(first)).sequences, answer)


@pytest.mark.parametrize("engine", [False, True])
def test_images_that_the_cache_holds_are_not_given_again(engine):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **OPTIONS, engine=engine)
    first = model.generate(**inputs, **GREEDY)
    more = behind(first.sequences, inputs["attention_mask"], TURNS["text"])
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with pytest.raises(ValueError, match="not encoded again: leave out pixel_values and image_grid_thw"):
        model.generate(**more, **images, **GREEDY, past_key_values=cache_of(first))


def test_the_tower_computes_a_share_of_a_new_image():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True, vision_keep=0.5)
    first = model.generate(**inputs, **GREEDY)
    more = behind(first.sequences, inputs["attention_mask"], TURNS["images"])
    model.generate(**more, **GREEDY, past_key_values=cache_of(first))
    assert state.report.path == "engine"
    assert next((stage.layer, stage.n_in, stage.n_kept) for stage in state.report.samples[0].stages) == (-1, 24, 14)
