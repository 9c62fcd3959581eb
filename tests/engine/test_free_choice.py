"""Selectors that say themselves how many tokens they take: the engine lays out the prompt behind the choice, and what
it gives is what the hooks give."""

from __future__ import annotations

import pytest
import torch
from test_deepstack import GREEDY, both, check

from covering import parametrize_pairs
from sparsevlm import Selection, apply_sparsevlm
from sparsevlm.compat import cache_of
from sparsevlm.selection.context import BEFORE_DECODER
from sparsevlm.selection.selectors.span_features import SpanFeaturesSelector
from toys import PROMPTS, make_inputs, tiny_model


class Pairs:
    """Merges every second token into the one before it, of a picture with an even number of tokens."""

    placement, adaptive = BEFORE_DECODER, True
    reads = frozenset({"merge"})

    def select(self, context, n_keep):
        kept = torch.arange(0, context.n_visual, 2, device=context.hidden_states.device)
        if n_keep is not None:
            return kept[:n_keep] if n_keep <= kept.shape[0] else torch.arange(n_keep, device=kept.device)
        target = torch.arange(context.n_visual, device=kept.device) // 2 * 2
        return Selection(kept, target, torch.full(target.shape, 0.5, device=kept.device))


class Reader:
    """Keeps tokens that the text, the tower and the features speak for."""

    placement, adaptive = BEFORE_DECODER, True
    needs = frozenset({"features", "text_features", "vision_attention"})

    def select(self, context, n_keep):
        score = context.vision_attention[1] + (context.features @ context.text_features.T).mean(dim=1)
        n_keep = max(1, int((score > score.mean()).sum())) if n_keep is None else n_keep
        return score.topk(n_keep).indices.sort().values


SELECTORS = {
    "span-features": SpanFeaturesSelector(unexplained=0.3),
    "few": SpanFeaturesSelector(unexplained=0.9, most=0.2),
    "pairs": Pairs(),
    "reader": Reader(),
}


@parametrize_pairs(selector=list(SELECTORS), prompt=list(PROMPTS), family=["qwen2_5_vl", "qwen3_vl"], floor=[0, 3])
def test_a_prompt(selector, prompt, family, floor):
    """In the second family the decoder adds features behind its first layers, which follow the choice."""
    options = {"selector": SELECTORS[selector], "min_keep": 3, "min_keep_per_image": floor}
    check(*both(tiny_model(family), make_inputs(*PROMPTS[prompt], family=family), **options))


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_turn_with_new_images(selector):
    model, turn = tiny_model(), make_inputs(*PROMPTS["two images"], seed=3)
    turn.pop("mm_token_type_ids")
    state, outputs = apply_sparsevlm(model, selector=SELECTORS[selector], min_keep=3), []
    for engine in (False, True):
        with state.options(engine=engine):
            first = model.generate(**make_inputs(*PROMPTS["image and video"]), **GREEDY)
            ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
            inputs = {**turn, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            outputs.append(model.generate(**inputs, **GREEDY, past_key_values=cache_of(first)))
            assert state.report.path == ("engine" if engine else "plain")
    check(*reversed(outputs))


def test_several_answers_to_one_prompt_share_the_choice():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    state = apply_sparsevlm(model, selector=SELECTORS["span-features"], min_keep=3, engine=True)
    model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    samples = state.report.samples
    assert state.report.path == "engine"
    assert samples[0].stages[0].kept == samples[-1].stages[0].kept
    assert 3 <= samples[0].stages[0].n_kept < samples[0].n_visual


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_answers_that_share_an_image_share_no_merged_tokens(family):
    """Drawn from logits so sharp that all are the greedy one."""
    model, inputs = tiny_model(family), make_inputs(*PROMPTS["two images"], family=family)
    state = apply_sparsevlm(model, selector=Pairs(), min_keep=3)
    wanted = model.generate(**inputs, **GREEDY).sequences
    sharp = {"max_new_tokens": 4, "do_sample": True, "temperature": 1e-4, "num_return_sequences": 3}
    with state.options(engine=True):
        found = model.generate(**inputs, **sharp)
        assert state.report.path == "engine"
    assert torch.equal(found, wanted.repeat_interleave(3, dim=0))


def test_what_the_tower_gave_is_left_as_it_is():
    """Where tokens are merged: another call may ask for the same image, which was encoded once."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, selector=Pairs(), min_keep=3, engine=True, image_cache=1 << 20)
    first = model.generate(**inputs, **GREEDY)
    again = model.generate(**inputs, **GREEDY)
    assert state.report.images_cached == 1
    check(again, first)


def test_layers_see_what_was_chosen_and_the_cache_holds_no_more():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, selector=SELECTORS["few"], min_keep=3)
    reports = []
    for engine in (False, True):
        with state.options(engine=engine):
            model.generate(**inputs, **GREEDY)
            reports.append(state.report)
    one, other = (report.samples[0] for report in reports)
    assert set(one.layer_tokens) == {one.stages[0].n_kept} == set(other.layer_tokens)
    assert reports[0].kv_bytes == reports[1].kv_bytes
