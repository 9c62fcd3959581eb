"""Masks that hide other tokens than the left end: the next token is predicted from the row it is in dense."""

from __future__ import annotations

import flash_emulation
import pytest
import torch
from oracle import joined_positions, recorded_positions
from runs import GREEDY, VARIANTS, all_dropped, assert_prunes, build, check_steps

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from toys import PROMPTS

ROWS = PROMPTS["batch, left padding"]
MASKS = ("right padding", "a hole before the image", "a hole behind it", "the last token", "the last three tokens")


def hide(inputs, what):
    """Change the mask of a batch, of which the second sample is padded."""
    mask = inputs["attention_mask"]
    if what == "right padding":
        n_pad = int((mask[1] == 0).sum())
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            inputs[name][1] = inputs[name][1].roll(-n_pad)
        return
    place = {"a hole before the image": 1, "a hole behind it": -3}
    mask[0, place.get(what, -1)] = 0
    if what == "the last three tokens":
        mask[1, -3:] = 0


def at(place, what, attention, variant, cache="dynamic"):
    run = build(ROWS, variant, place, attention=attention, cache=cache)
    hide(run.inputs, what)
    return run


@parametrize_pairs(
    what=MASKS, cache=["dynamic", "static", "none"], variant=["by attention", "random", "before the decoder"],
    attention=["sdpa", "eager"],
)  # fmt: skip
def test_pruned(what, cache, variant, attention, place):
    run = at(place, what, attention, VARIANTS[variant], cache)
    with recorded_positions(run.model) as seen:
        output = run.model.generate(**run.inputs, **GREEDY, **run.cache_options)
    assert_prunes(run.state.report)
    if cache == "none":
        seen = seen[-1:]
    dropped = all_dropped(run.state.report, run.batch)
    logits = run.reference_logits(run.inputs, output.sequences[:, :-1], dropped, joined_positions(run.model, seen))
    check_steps(run, output, logits, run.inputs["input_ids"].shape[1] - 1)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager", flash_emulation.NAME])
@pytest.mark.parametrize("what", MASKS)
def test_nothing_pruned(what, attention, engine, place):
    if engine and place.dtype != torch.float32:
        pytest.skip("rounding decides between tokens; the engine's logits are compared in engine/test_parity.py")
    run = at(place, what, attention, {"keep": 1.0})
    run.state.detach()
    options = {"max_new_tokens": 6, "do_sample": False}
    dense = run.model.generate(**run.inputs, **options)
    state = apply_sparsevlm(run.model, keep=1.0, engine=engine)
    assert torch.equal(run.model.generate(**run.inputs, **options), dense)
    if engine and place.device == "cpu" and attention != flash_emulation.NAME:
        ends_hidden = what not in MASKS[1:3]
        assert state.report.path == ("plain" if ends_hidden else "engine")
        assert ("last token is masked" in state.report.path_reason) == ends_hidden


@pytest.mark.parametrize("what", MASKS)
def test_both_paths_say_the_same(what, place):
    run = at(place, what, "sdpa", VARIANTS["by span"])
    options = {"max_new_tokens": 6, "do_sample": False}
    said = []
    for engine in (False, True):
        with run.state.options(engine=engine):
            said.append(run.model.generate(**run.inputs, **options))
    assert_prunes(run.state.report)
    assert torch.equal(*said)


@parametrize_pairs(
    batch=[1, 2], what=["left padding", "right padding"], variant=list(VARIANTS), attention=["sdpa", "eager"]
)
def test_a_static_cache_keeps_what_a_dynamic_one_keeps(batch, what, variant, attention, place):
    """transformers hands on another kind of mask then; padding has no say, whatever its token."""
    run = build(ROWS, VARIANTS[variant], place, attention=attention)
    hide(run.inputs, what)
    run.inputs["input_ids"][run.inputs["attention_mask"] == 0] = 5
    if batch == 1:
        run.inputs = {name: value[1:] for name, value in run.inputs.items() if name != "pixel_values"} | {
            "pixel_values": run.inputs["pixel_values"].chunk(2)[1]
        }
    said, kept = [], []
    for cache in ({}, {"cache_implementation": "static"}):
        said.append(run.model.generate(**run.inputs, **GREEDY, **cache))
        report = run.state.report
        kept.append([(sample.stages, sample.n_text) for sample in report.samples])
        assert_prunes(report)
    assert kept[0] == kept[1]
    assert torch.equal(said[0].sequences, said[1].sequences)
    run.state.detach()
    dense = [
        run.model.generate(**run.inputs, **GREEDY, **cache).sequences
        for cache in ({}, {"cache_implementation": "static"})
    ]
    assert torch.equal(*dense)
    with apply_sparsevlm(run.model, keep=1.0):
        kept_all = run.model.generate(**run.inputs, **GREEDY, cache_implementation="static").sequences
    assert torch.equal(kept_all, dense[0])
