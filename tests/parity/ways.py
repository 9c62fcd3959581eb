"""Ways of asking a pruned model, each compared with the reference, and which of them go with which model."""

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
    Run,
    all_dropped,
    assert_prunes,
    build,
    check_generated,
    check_second_turn,
)

from toys import FAMILIES, IS_OLD, PROMPTS, make_inputs, relative_error

ATTENTIONS = ("sdpa", "eager", flash_emulation.NAME)


def greedy(run):
    output = run.model.generate(**run.inputs, **GREEDY, **run.cache_options)
    if run.cache == "static":
        assert "static" in run.state.report.kv_note
    check_generated(run, output)


def sampling(run):
    torch.manual_seed(3)
    output = run.model.generate(**run.inputs, **{**GREEDY, "do_sample": True}, **run.cache_options)
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


TURNS = {"turn of text": ([("text", 6)],), "turn with image": IMAGE_TURNS}


def turn_of_text(run):
    check_second_turn(run, *TURNS["turn of text"])


def turn_with_image(run):
    check_second_turn(run, *TURNS["turn with image"])
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
    """How a model is asked, with which caches, whether a padding mask may be left out, and whether it meets all else:
    one that does not differs little from another that does.
    """

    ask: Callable
    caches: tuple[str, ...] = ("dynamic", "static")
    mask_may_be_absent: bool = True
    is_crossed: bool = True


WAYS = {
    "greedy": Way(greedy, ("dynamic", "static", "none")),
    "sampling": Way(sampling, is_crossed=False),
    "several sequences": Way(several_sequences, ("dynamic", "static", "none")),
    "beams": Way(beams, ("dynamic", "static", "none")),
    "prompt lookup": Way(prompt_lookup, ("dynamic",)),  # older transformers guess with no other
    "direct call": Way(direct_call, ("dynamic", "static", "none")),
    "turn of text": Way(turn_of_text, mask_may_be_absent=False),
    "turn with image": Way(turn_with_image, mask_may_be_absent=False),
    "going on": Way(going_on_with_its_cache, mask_may_be_absent=False),
}
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


def not_known_to_transformers(case) -> str:
    """Why transformers itself does not do right by a case; empty: it does."""
    family, copied = FAMILIES[case["family"]], case["way"] in ("several sequences", "beams")
    video = any(kind == "video" for row in PROMPTS[case["prompt"]] for kind, *_ in row)
    several = case["prompt"] in ("two images", "batch, unequal counts")
    one_token = "video" in family.kinds and family.kinds["video"].token == family.kinds["image"].token
    reasons = {
        "transformers takes what comes behind the first prompt for suffix, or for prompt": (
            family.prefix and ("turn" in case["way"] or case["way"] == "prompt lookup")
        ),
        "transformers counts the placeholders of images and videos together": (
            one_token and video and (case["prompt"] == "image and video" or case["way"] == "turn with image")
        ),
        "transformers mixes up images of copied prompts": one_token and copied and not IS_OLD and (video or several),
        "transformers splits what it encoded by frames, which it has joined": (
            case["family"] == "kimi_k25" and video and IS_OLD
        ),
        "transformers takes its positions for packed sequences": (
            case["family"] == "glm4v_moe" and case["attention"] == flash_emulation.NAME
        ),
        "positions are others without a mask": (  # those of the reference would be
            case["mask"] == "no mask" and family.positions_need_mask and case["way"] != "direct call"
        ),
        "transformers gives images to the wrong copies of prompts": (
            copied and not may_be_copied(case["family"], case["prompt"])
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def not_run_by_family(case) -> str:
    """Why transformers, or this library, does not take a case in its family; empty: it does."""
    family, rows = FAMILIES[case["family"]], PROMPTS[case["prompt"]]
    attention, cache, way = case["attention"], case["cache"], case["way"]
    how = {"none": "without a cache", "static": "with a static cache", "dynamic": "with a dynamic cache"}
    reasons = {
        "the family has no such inputs": not family.takes(rows),
        f"{attention} leaves out what the family asks of attention: a cap on scores, or sight both ways": (
            not family.runs(attention, "dynamic")
        ),
        f"the family does not run {how[cache]}": not family.runs(attention, cache),
        "transformers takes no new image on a kept cache": way == "turn with image" and not family.second_images,
        "recurrent layers take a batch with padding in the middle for tokens": (
            way == "turn with image" and family.is_hybrid and len(rows) > 1
        ),
        "states of recurrent layers cannot be cropped": way == "prompt lookup" and family.is_hybrid,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def not_asked(case) -> str:
    """Why a way of asking does not go with the other factors; empty: it does."""
    way, rows = WAYS[case["way"]], PROMPTS[case["prompt"]]
    if case["cache"] not in way.caches:
        return "no such cache"
    if case["mask"] == "no mask" and (case["prompt"] in PADDED or not way.mask_may_be_absent):
        return "a mask is needed"
    if case["way"] == "prompt lookup" and len(rows) > 1:
        return "transformers looks up for one prompt"
    if case["cache"] == "none" and case["way"] == "beams" and case["variant"] == "random":
        return "a draw is that of the row, which a beam leaves"
    # transformers' flash attention needs a mask to cut the buffer of a static cache; ``generate`` makes one.
    buffer = case["attention"] == flash_emulation.NAME and case["cache"] == "static"
    if buffer and case["way"] == "direct call" and case["mask"] == "no mask":
        return "flash attention needs a mask to cut a buffer"
    return ""


def why_not(case) -> str:
    """Why a case is not tried; empty: it is."""
    return not_asked(case) or not_run_by_family(case) or not_known_to_transformers(case)


def possible(case) -> bool:
    """Whether a case is tried."""
    return not why_not(case)


def made(case, place, **options) -> Run:
    """The pruned model and the prompt of a case, with further options of pruning."""
    rows = PROMPTS[case["prompt"]]
    if case["way"] == "prompt lookup":
        rows = [[("text", 8), *rows[0], ("text", 4)]]
    return build(
        rows, {**VARIANTS[case["variant"]], **options}, place, attention=case["attention"], family=case["family"],
        cache=case["cache"], mask=case["mask"] == "mask",
    )  # fmt: skip


def try_case(case, place, **options) -> Run:
    """Run a case and compare it with the reference."""
    run = made(case, place, **options)
    WAYS[case["way"]].ask(run)
    return run
