"""Features that the decoder adds behind its first layers follow what prune steps leave, on the engine as on hooks."""

from __future__ import annotations

import pytest
import torch

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.compat import cache_of
from sparsevlm.engine.text import prune_program, workspace
from toys import IS_OLD, PROMPTS, make_inputs, relative_error, tiny_model

GREEDY = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
EARLY = {"keep": 0.5, "min_keep": 3}


class Halves:
    """Keeps what is first, and says so on the host."""

    def select(self, context, n_keep):
        return torch.arange(n_keep, device=context.hidden_states.device)


TARGETS = {
    "before the decoder": {**EARLY, "selector": "divprune"},
    "at 0": {**EARLY, "selector": "random", "target_layers": [0]},
    "merged at 0": {**EARLY, "selector": "sparsevlm", "tau": 0.8, "theta": 0.5, "target_layers": [0]},
    "summed at 0 and 1": {**EARLY, "selector": "sparsevlm", "merge": "sum", "target_layers": [0, 1]},
    "at 0, 1 and 3": {**EARLY, "target_layers": [0, 1, 3]},
    "by rank at 0": {"min_keep": 3, "rank_tolerance": 0.3, "target_layers": [0]},
    "merged before the decoder": {**EARLY, "selector": "tome"},
    "chosen on the host": {**EARLY, "selector": Halves(), "target_layers": [1]},
    "behind the last": {**EARLY, "target_layers": [2]},
    "dense": {"keep": 1.0},
}


def both(model, inputs, **options):
    """Outputs on hooks and on the engine."""
    state = apply_sparsevlm(model, **options)
    wanted, report = model.generate(**inputs, **GREEDY), state.report
    with state.options(engine=True):
        found = model.generate(**inputs, **GREEDY)
    assert (report.path, state.report.path) == ("plain", "engine")
    assert state.report.samples == report.samples
    return found, wanted


def check(found, wanted):
    assert torch.equal(found.sequences, wanted.sequences)
    assert all(relative_error(one, other) < 1e-5 for one, other in zip(found.logits, wanted.logits, strict=True))


@parametrize_pairs(
    targets=list(TARGETS), prompt=["one image", "two images", "image and video", "batch, unequal counts"]
)
def test_a_prompt(targets, prompt):
    inputs = make_inputs(*PROMPTS[prompt], family="qwen3_vl")
    check(*both(tiny_model("qwen3_vl"), inputs, **TARGETS[targets]))


@pytest.mark.parametrize("targets", ["before the decoder", "merged at 0", "merged before the decoder", "at 0, 1 and 3"])
def test_a_turn_with_new_images(targets):
    model, turn = tiny_model("qwen3_vl"), make_inputs(*PROMPTS["two images"], family="qwen3_vl", seed=3)
    turn.pop("mm_token_type_ids")
    state, outputs = apply_sparsevlm(model, **TARGETS[targets]), []
    for engine in (False, True):
        with state.options(engine=engine):
            first = model.generate(**make_inputs(*PROMPTS["image and video"], family="qwen3_vl"), **GREEDY)
            ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
            inputs = {**turn, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            outputs.append(model.generate(**inputs, **GREEDY, past_key_values=cache_of(first)))
            assert state.report.path == ("engine" if engine else "plain")
    check(*reversed(outputs))


def stays(monkeypatch):
    monkeypatch.setattr(prune_program, "_follow", lambda *given: None)


def is_not_merged(monkeypatch):
    merge = prune_program._merge
    monkeypatch.setattr(
        prune_program, "_merge", lambda space, *given: given[1] is space.hidden and merge(space, *given)
    )


def is_left_out(monkeypatch):
    monkeypatch.setattr(workspace.Workspace, "place_late", lambda *given: None)


@pytest.mark.parametrize(
    ("spoil", "targets"), [(stays, "at 0, 1 and 3"), (is_not_merged, "merged at 0"), (is_left_out, "dense")]
)
def test_the_hooks_tell_wrong_features(spoil, targets, monkeypatch):
    spoil(monkeypatch)
    inputs = make_inputs(*PROMPTS["one image"], family="qwen3_vl")
    found, wanted = both(tiny_model("qwen3_vl"), inputs, **TARGETS[targets])
    assert relative_error(found.logits[0], wanted.logits[0]) > 1e-3


@pytest.mark.skipif(IS_OLD, reason="this transformers takes no encoded images")
def test_encoded_images_bring_theirs():
    model, inputs = tiny_model("qwen3_vl"), make_inputs(*PROMPTS["two images"], family="qwen3_vl")
    with torch.no_grad():
        encoded = model.model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
    inputs["mm_encoder_outputs"] = {"image": encoded}
    check(*both(model, inputs, **TARGETS["at 0"]))
