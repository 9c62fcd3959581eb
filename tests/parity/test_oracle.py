"""Pruned runs equal a dense run in which the dropped tokens are hidden as keys from the following layer on."""

from __future__ import annotations

import flash_emulation
import pytest
import torch
from runs import GREEDY, NEW_TOKENS, VARIANTS, build, check_generated
from transformers.cache_utils import StaticLayer
from ways import ATTENTIONS, WAYS, may_be_copied, possible, try_case

from covering import covering_array, factor_groups
from sparsevlm import apply_sparsevlm
from toys import FAMILIES, IS_OLD, PROMPTS, make_inputs, tiny_model

FACTORS = {
    "prompt": tuple(PROMPTS),
    "variant": tuple(VARIANTS),
    "attention": ATTENTIONS,
    "way": tuple(name for name, way in WAYS.items() if way.is_crossed),
    "cache": ("dynamic", "static", "none"),
    "mask": ("mask", "no mask"),
    "family": tuple(FAMILIES),
}
# What meets in masks and in the bookkeeping of the cache; all other factors are combined two by two.
TOGETHER = (("prompt", "variant", "attention"), ("way", "cache", "attention"), ("way", "cache", "variant"))
CASES = covering_array(FACTORS, factor_groups(FACTORS, 2, *TOGETHER), possible)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_pruned_is_masked(case, place):
    try_case(case, place)


# Thinkers repeat in a way of their own, patch by patch, which nothing tells.
MIXED_UP = [name for name in FAMILIES if not may_be_copied(name, "two images") and "thinker" not in name]


@pytest.mark.skipif(not IS_OLD, reason="newer transformers encode before they copy")
@pytest.mark.parametrize("copies", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_copied_prompts_of_packed_images_are_refused(copies, place):
    """Images of two prompts, A and B, come as A, B, A, B for two copies of each."""
    run = build(PROMPTS["batch, same size"], VARIANTS["random"], place, family="minicpmv4_6")
    with pytest.raises(NotImplementedError, match="to the wrong prompts where each is copied 2 times"):
        run.model.generate(**run.inputs, max_new_tokens=2, **copies)


@pytest.mark.parametrize("copies", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("family", MIXED_UP)
def test_copied_prompts_that_transformers_mixes_up_are_refused(family, copies, place):
    """On hooks; the engine copies what is encoded."""
    run = build(PROMPTS["two images"], {**VARIANTS["random"], "engine": False}, place, family=family)
    with pytest.raises(NotImplementedError, match="to the wrong prompts where each is copied 2 times"):
        run.model.generate(**run.inputs, max_new_tokens=2, **copies)


@pytest.mark.parametrize("variant", ["random", "rank adaptive", "before the decoder", "before and inside"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_static_cache_of_rows_without_padding_that_keep_unequal_numbers(variant, attention, place):
    """SDPA is given no mask for the prompt then, but needs one as soon as the rows differ."""
    rows = [("image", 4, 4), ("text", 4)], [("image", 2, 4), ("text", 12)]
    run = build(rows, VARIANTS[variant], place, attention=attention, cache="static")
    assert bool(run.inputs["attention_mask"].all())
    dynamic = run.model.generate(**run.inputs, **GREEDY)
    output = run.model.generate(**run.inputs, **GREEDY, cache_implementation="static")
    assert len({sample.final_tokens for sample in run.state.report.samples}) == 2
    assert torch.equal(output.sequences, dynamic.sequences)
    check_generated(run, output)


def test_flash_attention_with_a_buffer_that_gets_full(place):
    """transformers gives no mask as soon as the sequence is as long as the buffer; a pruned layer's is not full yet."""
    run = build(PROMPTS["one image"], VARIANTS["random"], place, attention=flash_emulation.NAME, cache="static")
    check_generated(run, run.model.generate(**run.inputs, **GREEDY, cache_implementation="static"))


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="these transformers guess with no static cache")
def test_prompt_lookup_with_a_static_cache(place):
    rows = [[("text", 8), *PROMPTS["one image"][0], ("text", 4)]]
    run = build(rows, VARIANTS["before the decoder"], place, cache="static")
    run.inputs["input_ids"][0, -4:] = run.inputs["input_ids"][0, 2:6]
    guesses = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 3}
    check_generated(run, run.model.generate(**run.inputs, **{**GREEDY, **guesses}, **run.new_cache()))


def test_more_guesses_are_wrong_than_half_of_the_text_behind_the_image(place):
    run = build([[("text", 20), ("image", 4, 6), ("text", 4)]], VARIANTS["by attention"], place)
    run.inputs["input_ids"][0, -3:] = run.inputs["input_ids"][0, 2:5]
    guesses = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 10}
    check_generated(run, run.model.generate(**run.inputs, **{**GREEDY, **guesses}))


def test_static_cache_where_the_rank_decides():
    model = tiny_model()
    inputs = make_inputs([("image", 6, 6), ("text", 6)], [("image", 6, 6), ("text", 6)])
    state = apply_sparsevlm(model, selector="span", min_keep=3, rank_tolerance=0.02)
    dynamic = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    assert len({sample.final_tokens for sample in state.report.samples}) == 2  # by the rank
    static = model.generate(**inputs, max_new_tokens=NEW_TOKENS, cache_implementation="static")
    assert torch.equal(static, dynamic)


def test_a_batch_is_cropped_no_further_than_its_shortest_text(place):
    """Behind the image of the second sample are five tokens, with the one that closes it."""
    rows = [("image", 4, 6), ("text", 9)], [("text", 5), ("image", 4, 6), ("text", 4)]
    run = build(rows, VARIANTS["random"], place)
    with torch.no_grad():
        cache = run.model(**run.inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="only the last 5 are text"):
        cache.crop(-6)
    cache.crop(-2)
    assert cache.get_seq_length() == run.inputs["input_ids"].shape[1] - 2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_layers_are_given_positions_of_their_own_rows_or_none(attention, place):
    """Those of other rows could be taken for packed sequences."""
    run = build(PROMPTS["one image"], VARIANTS["by attention"], place, attention=attention)
    given = []

    def look(module, args, kwargs):
        positions = kwargs.get("position_ids")
        given.append((args[0].shape[1], None if positions is None else positions.shape[-1]))

    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in run.state.adapter.decoder.layers]
    run.model.generate(**run.inputs, **{**GREEDY, "max_new_tokens": 1})
    for handle in handles:
        handle.remove()
    assert len({n_rows for n_rows, _ in given}) == 3  # two stages
    assert all(n_positions in (None, n_rows) for n_rows, n_positions in given)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_hidden_states_come_ragged(attention, place):
    run = build(PROMPTS["one image"], VARIANTS["by attention"], place, attention=attention)
    with torch.no_grad():
        output = run.model(**run.inputs, output_hidden_states=True)
    (sample,) = run.state.report.samples
    lengths = [hidden.shape[1] - sample.n_text for hidden in output.hidden_states[1:-1]]
    assert lengths == list(sample.layer_tokens[:-1])
    assert len(set(lengths)) == 3  # two stages
