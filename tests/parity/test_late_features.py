"""Features that the decoder adds behind its first layers reach the tokens that are left there, and no others."""

from __future__ import annotations

import pytest
import torch
from runs import GREEDY, AtRandom, all_dropped, build, check_generated

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.hooks.late_rows import LateRows
from sparsevlm.models import LateFeatures, adapter_for
from sparsevlm.request.request import Request
from toys import FAMILIES, PROMPTS, make_inputs, relative_error, tiny_model

LATE = tuple(name for name in FAMILIES if adapter_for(tiny_model(name)).decoder.late_features is not None)
EARLY = {"keep": 0.5, "min_keep": 3, "recycle": False, "selector": "sparsevlm"}
TARGETS = {
    "before the decoder": {"keep": 0.5, "min_keep": 3, "selector": AtRandom()},
    "0": {**EARLY, "target_layers": [0]},
    "1": {**EARLY, "target_layers": [1]},
    "0, 1 and 3": {**EARLY, "target_layers": [0, 1, 3]},
    "rank at 0": {**EARLY, "keep": None, "rank_tolerance": 0.3, "target_layers": [0]},
}


def test_families_with_such_features_are_here():
    assert LATE == ("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker")


@parametrize_pairs(
    family=LATE,
    targets=tuple(TARGETS),
    prompt=("one image", "two images", "image and video", "batch, unequal counts"),
    attention=("sdpa", "eager"),
)
def test_targets_before_the_last_addition(family, targets, prompt, attention, place):
    run = build(PROMPTS[prompt], TARGETS[targets], place, attention=attention, family=family)
    check_generated(run, run.model.generate(**run.inputs, **GREEDY))


def one_row_off(monkeypatch):
    made = LateRows.__init__

    def init(self, request, mask, features):
        made(self, request, mask, [rows.roll(1, dims=0) for rows in features])

    monkeypatch.setattr(LateRows, "__init__", init)


def left_out(monkeypatch):
    monkeypatch.setattr(LateRows, "add", lambda self, request, layer, hidden_states: hidden_states)


def left_out_behind_the_last(monkeypatch):
    add = LateRows.add
    monkeypatch.setattr(LateRows, "add", lambda *given: given[3] if given[2] == 2 else add(*given))


@pytest.mark.parametrize("spoil", [one_row_off, left_out, left_out_behind_the_last])
@pytest.mark.parametrize("targets", ["before the decoder", "0", "1"])
@pytest.mark.parametrize("family", LATE)
def test_the_reference_tells_wrong_features(family, targets, spoil, place, monkeypatch):
    spoil(monkeypatch)
    run = build(PROMPTS["two images"], {**TARGETS[targets], "engine": False}, place, family=family)
    output = run.model.generate(**run.inputs, **GREEDY)
    dropped = all_dropped(run.state.report, 1)
    logits = run.reference_logits(run.inputs, output.sequences[:, :-1], dropped)
    assert relative_error(output.logits[0], logits[:, run.inputs["input_ids"].shape[1] - 1]) > 0.01


@pytest.mark.parametrize("targets", ["before the decoder", "0", "1"])
def test_the_decoder_itself_would_fail(targets, place, monkeypatch):
    monkeypatch.setattr(LateFeatures, "come_behind", lambda *given: False)
    run = build(PROMPTS["one image"], {**TARGETS[targets], "engine": False}, place, family="qwen3_vl")
    with pytest.raises((IndexError, RuntimeError), match="mask"):
        run.model.generate(**run.inputs, **GREEDY)


@pytest.mark.parametrize("options", [{"keep": 0.5, "min_keep": 3, "selector": "span"}, {"keep": 1.0}])
def test_the_decoder_adds_itself_where_it_can(options, monkeypatch):
    """At the default target layers, and where nothing is dropped."""
    monkeypatch.setattr(LateRows, "__init__", lambda *given: pytest.fail("taken over for nothing"))
    model = tiny_model("qwen3_vl")
    apply_sparsevlm(model, **options)
    model.generate(**make_inputs(*PROMPTS["one image"], family="qwen3_vl"), max_new_tokens=2)


@pytest.mark.parametrize("prompt", ["image and video", "batch, unequal counts"])
@pytest.mark.parametrize("family", LATE)
def test_what_is_added_is_bit_equal(family, prompt, monkeypatch):
    """With nothing dropped, taken over all the same."""
    monkeypatch.setattr(Request, "drops_nothing", False)
    made = []
    monkeypatch.setattr(LateRows, "add", lambda *given, add=LateRows.add: made.append(given) or add(*given))
    model, inputs = tiny_model(family), make_inputs(*PROMPTS[prompt], family=family)
    dense = model.generate(**inputs, **GREEDY)
    apply_sparsevlm(model, keep=1.0, min_keep=2, target_layers=[0, 1, 3])
    pruned = model.generate(**inputs, **GREEDY)
    assert made
    assert all(torch.equal(a, b) for a, b in zip(pruned.logits, dense.logits, strict=True))


@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_recycled_tokens_get_features_merged_as_their_states_are(merge, monkeypatch):
    model, inputs = tiny_model("qwen3_vl"), make_inputs(*PROMPTS["one image"], family="qwen3_vl")
    decoder, seen, survivors = model.model.language_model, {}, []
    take = lambda module, args, kwargs: seen.update(features=kwargs["deepstack_visual_embeds"])  # noqa: E731
    decoder.register_forward_pre_hook(take, with_kwargs=True)
    keep = LateRows.keep
    monkeypatch.setattr(LateRows, "keep", lambda self, found: (survivors.extend(found), keep(self, found)))
    state = apply_sparsevlm(model, keep=0.5, min_keep=3, selector="sparsevlm", target_layers=[0], merge=merge)
    decoder.layers[1].register_forward_hook(lambda module, args, output: seen.update(before=output))
    decoder.layers[2].register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    (found,) = survivors
    target, weight = found.selection.merge_target.tolist(), found.selection.weight.tolist()
    wanted = torch.zeros_like(seen["features"][1])
    for row, (to, share) in enumerate(zip(target, weight, strict=True)):
        if to >= 0:
            wanted[to] += share * seen["features"][1][row]
    wanted = wanted[found.selection.keep_idx]
    positions = torch.tensor(state.report.logit_positions[0])
    added = (seen["after"] - seen["before"])[0]
    is_visual = torch.isin(positions, found.after)
    torch.testing.assert_close(added[is_visual], wanted, rtol=1e-4, atol=1e-6)
    assert not added[~is_visual].any()
    assert len(set(target)) < sum(to >= 0 for to in target)  # something was merged
