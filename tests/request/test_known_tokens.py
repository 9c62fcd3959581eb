"""Tokens given on a kept cache that are not those it was filled with, and caches of which that is not known."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from transformers import DynamicCache

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [1, 3], "keep": 0.6}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
GREEDY["suppress_tokens"] = [*range(80, 94)]


def answered(rows=PROMPTS["one image"], engine=False, **more):
    """Model, cache and inputs of a question of text behind an answer."""
    model, inputs = tiny_model(), make_inputs(*rows)
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    output = model.generate(**inputs, **{**GREEDY, **more})
    return model, state, cache_of(output), asked(inputs, output)


def asked(inputs, output):
    """A question of text behind what was generated."""
    n = output.sequences.shape[0]
    new = make_inputs(*[[("text", 5)]] * n, seed=9)["input_ids"]
    ids = torch.cat([output.sequences, new], dim=1)
    mask = inputs["attention_mask"].repeat_interleave(n // inputs["attention_mask"].shape[0], dim=0)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return {"input_ids": ids, "attention_mask": mask}


def changed(inputs, position, row=0):
    """Another token somewhere."""
    ids = inputs["input_ids"].clone()
    ids[row, position] = ids[row, position] % 70 + 3
    return {**inputs, "input_ids": ids}


def refused(model, cache, inputs, match):
    before = [layer.keys for layer in cache.layers]
    with pytest.raises(ValueError, match=match):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert all(layer.keys is keys for layer, keys in zip(cache.layers, before, strict=True))


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("rows", ["one image", "batch, left padding"])
def test_other_tokens_than_those_in_the_cache_are_refused(rows, engine):
    """In every turn, and where tokens of some were given alone."""
    model, state, cache, inputs = answered(PROMPTS[rows], engine)
    for alone in (False, True, False):
        past_len, row = cache.get_seq_length(), inputs["input_ids"].shape[0] - 1
        for position in (past_len - 1, past_len - 3):
            wrong = changed(inputs, position, row)
            own, theirs = (int(one["input_ids"][row, position]) for one in (wrong, inputs))
            match = f"token {position} of sample {row} is {own}, and the cache was filled with {theirs} there"
            refused(model, cache, wrong, match)
        given = {**inputs, "input_ids": inputs["input_ids"][:, past_len:]} if alone else inputs
        output = model.generate(**given, **GREEDY, past_key_values=cache)
        assert (state.report.path == "engine") == engine
        if alone:
            output.sequences = torch.cat([inputs["input_ids"][:, :past_len], output.sequences], dim=1)
        inputs = asked(inputs, output)


def test_a_cache_that_was_given_is_known_as_well():
    model, inputs, cache = tiny_model(), make_inputs(*PROMPTS["one image"]), DynamicCache()
    apply_sparsevlm(model, **OPTIONS, engine=False)
    sequences = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    inputs = {"input_ids": torch.cat([sequences, sequences[:, :3]], dim=1)}
    sequences[:] = 5  # which is the caller's to change
    model.generate(**inputs, **GREEDY, past_key_values=copy.deepcopy(cache))
    refused(model, cache, changed(inputs, 38), "token 38 of sample 0")


def crop(model, cache, inputs):
    cache.crop(-2)


def crop_and_fill(model, cache, inputs):
    cache.crop(-2)
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, -2:], past_key_values=cache)


def direct_call(model, cache, inputs):
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, -2:-1], past_key_values=cache)


def in_place(model, cache, inputs):
    cache.layers[2].keys[:, :, -2:] = 0.0


def other_layers(model, cache, inputs):
    cache.layers[2] = copy.deepcopy(cache.layers[2])


def select_rows(model, cache, inputs):
    cache.batch_select_indices(torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("edit", [crop, crop_and_fill, direct_call, in_place, other_layers, select_rows])
@pytest.mark.parametrize("engine", [False, True])
def test_caches_that_somebody_has_changed_are_not_compared(edit, engine):
    model, _, cache, inputs = answered(engine=engine)
    edit(model, cache, inputs)
    model.generate(**changed(inputs, cache.get_seq_length() - 3), **GREEDY, past_key_values=cache)


@pytest.mark.parametrize("made", ["a copy", "by hand", "beams", "static", "under refresh"])
def test_caches_of_which_nothing_is_known_are_not_compared(made):
    more = {"beams": {"num_beams": 2, "num_return_sequences": 2}, "static": {"cache_implementation": "static"}}
    model, state, cache, inputs = answered(**more.get(made, {}), max_new_tokens=4)
    if made == "a copy":
        cache = copy.deepcopy(cache)
    elif made == "by hand":
        layers, cache = cache.layers, DynamicCache(config=model.config)
        cache.layers[:] = layers
    wrong = changed(inputs, cache.get_seq_length() - 1)
    if made == "under refresh":  # which prefills the tokens that are given
        with state.options(turns="refresh"):
            cache = cache_of(model.generate(**make_inputs(*PROMPTS["one image"]), **GREEDY))
            model.generate(**wrong, **GREEDY, past_key_values=cache)
    elif made == "static":
        assert model.generate._known_tokens.of(cache) is None
    else:
        model.generate(**wrong, **GREEDY, past_key_values=cache)


def test_tokens_that_are_hidden_are_not_compared():
    model, _, cache, inputs = answered(PROMPTS["batch, left padding"])
    row = int(inputs["attention_mask"][:, 0].argmin())
    assert not inputs["attention_mask"][row, 0]
    model.generate(**changed(inputs, 0, row), **GREEDY, past_key_values=cache)


def test_what_is_known_goes_with_its_cache_and_not_with_copies_of_the_model():
    model, _, cache, inputs = answered()
    known = model.generate._known_tokens
    assert known.of(cache) is not None
    assert pickle.loads(pickle.dumps(known)).of(cache) is None
    assert copy.deepcopy(known).of(cache) is None
    with torch.inference_mode():
        other = cache_of(model.generate(**make_inputs(*PROMPTS["one image"]), **GREEDY))
    refused(model, other, changed(inputs, 30), "token 30 of sample 0")
    del cache, other
    gc.collect()
    assert not known._filled
