"""Pruned runs equal a dense run in which the dropped tokens are hidden as keys from the following layer on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import flash_emulation
import pytest
import torch
from oracle import joined_positions, recorded_positions
from runs import (
    GREEDY,
    IMAGE_TURNS,
    NEW_TOKENS,
    VARIANTS,
    all_dropped,
    assert_prunes,
    build,
    check_generated,
    check_second_turn,
)
from transformers.cache_utils import StaticLayer

from covering import covering_array, factor_groups
from sparsevlm import apply_sparsevlm
from toys import FAMILIES, IS_OLD, PROMPTS, make_inputs, relative_error, tiny_model

ATTENTIONS = ("sdpa", "eager", flash_emulation.NAME)


def greedy(run):
    output = run.model.generate(**run.inputs, **GREEDY, **run.cache_options)
    if run.cache == "static":
        assert "static" in run.state.report.kv_note
    check_generated(run, output)


def several_sequences(run):
    torch.manual_seed(3)
    several = {"do_sample": True, "num_return_sequences": 3}
    output = run.model.generate(**run.inputs, **{**GREEDY, **several}, **run.cache_options)
    check_generated(run, output, repeats=3)


def beams(run):
    """Logits are those of hypotheses that were given up as well: the scores of what is left are compared.

    The prompt of a hypothesis is that of the row in which it began, which chose for itself.
    """
    several = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    output = run.model.generate(**run.inputs, **GREEDY, **several, **run.cache_options)
    assert_prunes(run.state.report)
    batch, start = output.sequences.shape[0], run.inputs["input_ids"].shape[1]
    assert batch == 3 * run.batch
    of_rows = all_dropped(run.state.report, batch)
    dropped = [of_rows[row] for row in output.beam_indices[:, 0].tolist()]
    logits = run.reference_logits(run.expanded(3), output.sequences[:, :-1], dropped)
    found = logits[:, start - 1 :].double().log_softmax(-1).gather(2, output.sequences[:, start:, None])
    wanted = found.sum(dim=(1, 2)) / NEW_TOKENS
    assert output.sequences_scores.tolist() == pytest.approx(wanted.tolist(), rel=run.place.tolerance)


def prompt_lookup(run):
    """Something to look up is in the prompt: a guess from the first step on."""
    run.inputs["input_ids"][0, -4:] = run.inputs["input_ids"][0, 2:6]
    plain = run.model.generate(**run.inputs, **GREEDY)
    without_guesses = run.state.report.samples[0].stages
    output = run.model.generate(**run.inputs, **{**GREEDY, "max_new_tokens": 12}, prompt_lookup_num_tokens=3)
    stages = run.state.report.samples[0].stages
    assert [stage.raters for stage in stages] == [stage.raters for stage in without_guesses]
    if run.place.dtype == torch.float32:  # in half precision a guess verified in a block may round to another token
        assert [stage.kept for stage in stages] == [stage.kept for stage in without_guesses]
        assert torch.equal(output.sequences[:, : plain.sequences.shape[1]], plain.sequences)
    check_generated(run, output)


def direct_call(run):
    with torch.no_grad():
        got = run.model(**run.inputs, **run.new_cache()).logits
    report = run.state.report
    assert_prunes(report)
    wanted = run.reference_logits(run.inputs, run.inputs["input_ids"], all_dropped(report, run.batch))
    assert len(report.logit_positions) == run.batch
    for b, positions in enumerate(report.logit_positions):
        rows = [i for i, position in enumerate(positions) if position >= 0]
        assert len(positions) == got.shape[1]
        assert len(rows) == report.samples[b].n_text + report.samples[b].final_tokens
        assert relative_error(got[b, rows], wanted[b, [positions[i] for i in rows]]) <= run.place.tolerance


def turn_of_text(run):
    check_second_turn(run, [("text", 6)])


def turn_with_image(run):
    check_second_turn(run, *IMAGE_TURNS)
    assert_prunes(run.state.report)


def going_on_with_its_cache(run):
    """The text model makes the cache of a direct call itself, after the call has begun."""
    model, inputs = run.model, run.inputs
    token = torch.full((run.batch, 1), 7, device=run.place.device)
    with torch.no_grad():
        with recorded_positions(model) as seen:
            cache = model(**inputs, **{"use_cache": True, **run.new_cache()}).past_key_values
        dropped = all_dropped(run.state.report, run.batch)
        if run.cache == "dynamic":
            of_layers = [
                (layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None
            ]
            held = sum(x.numel() * x.element_size() for pair in of_layers for x in pair)
            assert run.state.report.kv_bytes.sparse == held
            # Layers with a window hold more than it where something was dropped.
            assert held < run.state.report.kv_bytes.dense or "window" in run.state.report.kv_note
        positions = joined_positions(model, seen)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"attention_mask": mask, "position_ids": positions[..., -1:], "past_key_values": cache}
        got = model(input_ids=token, **step).logits[:, -1]
    sequences = torch.cat([inputs["input_ids"], token], dim=1)
    wanted = run.reference_logits(inputs, sequences, dropped, positions)[:, -1]
    assert relative_error(got, wanted) <= run.place.tolerance


@dataclass(frozen=True)
class Way:
    """How a model is asked, with which caches, and whether a padding mask may be left out."""

    ask: Callable
    caches: tuple[str, ...] = ("dynamic", "static")
    mask_may_be_absent: bool = True


WAYS = {
    "greedy": Way(greedy, ("dynamic", "static", "none")),
    "several sequences": Way(several_sequences, ("dynamic", "static", "none")),
    "beams": Way(beams, ("dynamic", "static", "none")),
    "prompt lookup": Way(prompt_lookup, ("dynamic",)),  # older transformers guess with no other
    "direct call": Way(direct_call, ("dynamic", "static", "none")),
    "turn of text": Way(turn_of_text, mask_may_be_absent=False),
    "turn with image": Way(turn_with_image, mask_may_be_absent=False),
    "going on": Way(going_on_with_its_cache, mask_may_be_absent=False),
}
FACTORS = {
    "prompt": tuple(PROMPTS),
    "variant": tuple(VARIANTS),
    "attention": ATTENTIONS,
    "way": tuple(WAYS),
    "cache": ("dynamic", "static", "none"),
    "mask": ("mask", "no mask"),
    "family": tuple(FAMILIES),
}
# What meets in masks and in the bookkeeping of the cache; all other factors are combined two by two.
TOGETHER = (("prompt", "variant", "attention"), ("way", "cache", "attention"), ("way", "cache", "variant"))
PADDED = tuple(name for name, rows in PROMPTS.items() if not bool(make_inputs(*rows)["attention_mask"].all()))


@functools.cache
def may_be_copied(family: str, prompt: str) -> bool:
    """Whether transformers gives images to the right copies; where not, it is refused (test_copied_prompts)."""
    if FAMILIES[family].repeats == "packs":
        return len(PROMPTS[prompt]) == 1
    if FAMILIES[family].repeats != "images":
        return FAMILIES[family].repeats == "samples"
    pixels = [value for name, value in make_inputs(*PROMPTS[prompt], family=family).items() if "pixel" in name]
    one_each = all(sum(kind != "text" for kind, *_ in row) == 1 for row in PROMPTS[prompt])
    return one_each and all(len(value) == len(PROMPTS[prompt]) for value in pixels)


def is_known_to_transformers(case) -> bool:
    """Whether transformers itself does right by a case."""
    family, copied = FAMILIES[case["family"]], case["way"] in ("several sequences", "beams")
    video = any(kind == "video" for row in PROMPTS[case["prompt"]] for kind, *_ in row)
    if family.prefix:  # it takes what comes behind the first prompt for suffix, or for prompt; and drops such masks
        known = "turn" not in case["way"] and case["way"] != "prompt lookup"
        return known and (not copied or may_be_copied(case["family"], case["prompt"]))
    if "video" in family.kinds and family.kinds["video"].token == family.kinds["image"].token:
        # GLM: it counts the placeholders of images and videos together, and mixes up images of copied prompts.
        several = case["prompt"] in ("two images", "batch, unequal counts")
        mixed = video and (case["prompt"] == "image and video" or case["way"] == "turn with image")
        if mixed or (copied and not IS_OLD and (video or several)):
            return False
    if case["family"] == "kimi_k25" and video and IS_OLD:
        return False  # it splits what it encoded by frames, which it has joined
    if case["family"] == "glm4v_moe" and case["attention"] == flash_emulation.NAME:
        return False  # its positions are taken for packed sequences
    if case["mask"] == "no mask" and family.positions_need_mask and case["way"] != "direct call":
        return False  # the reference would have other positions
    return not copied or may_be_copied(case["family"], case["prompt"])


def family_runs(case) -> bool:
    """Whether transformers itself, and this library, take a case in its family."""
    family, rows = FAMILIES[case["family"]], PROMPTS[case["prompt"]]
    if not family.runs(case["attention"], case["cache"]):
        return False
    if case["way"] == "turn with image" and (not family.second_images or (family.is_hybrid and len(rows) > 1)):
        return False
    return case["way"] != "prompt lookup" or not family.is_hybrid


def possible(case) -> bool:
    way, rows = WAYS[case["way"]], PROMPTS[case["prompt"]]
    if case["cache"] not in way.caches or not FAMILIES[case["family"]].takes(rows) or not family_runs(case):
        return False
    if case["mask"] == "no mask" and (case["prompt"] in PADDED or not way.mask_may_be_absent):
        return False
    if case["way"] == "prompt lookup" and len(rows) > 1:
        return False
    if not is_known_to_transformers(case):
        return False
    if case["cache"] == "none" and case["way"] != "direct call":
        return case["way"] != "beams" or case["variant"] != "random"  # a draw is that of the row, which a beam leaves
    # transformers' flash attention needs a mask to cut the buffer of a static cache; ``generate`` makes one.
    buffer = case["attention"] == flash_emulation.NAME and case["cache"] == "static"
    return not (buffer and case["way"] == "direct call" and case["mask"] == "no mask")


CASES = covering_array(FACTORS, factor_groups(FACTORS, 2, *TOGETHER), possible)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_pruned_is_masked(case, place):
    rows = PROMPTS[case["prompt"]]
    if case["way"] == "prompt lookup":
        rows = [[("text", 8), *rows[0], ("text", 4)]]
    run = build(
        rows, VARIANTS[case["variant"]], place, attention=case["attention"], family=case["family"],
        cache=case["cache"], mask=case["mask"] == "mask",
    )  # fmt: skip
    WAYS[case["way"]].ask(run)


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
    run = build(PROMPTS["two images"], VARIANTS["random"], place, family=family)
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
    state = apply_sparsevlm(model, min_keep=3, rank_tolerance=0.02)
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
