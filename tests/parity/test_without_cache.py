"""Without a cache every step brings the prompt anew: what was chosen in the first holds in all of them."""

from __future__ import annotations

import pytest
import torch

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.selection.selectors import SELECTORS
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "keep": 0.5}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2, "do_sample": False},
}


def said(model, inputs, **options):
    model.model.rope_deltas = None
    torch.manual_seed(3)
    return model.generate(**inputs, max_new_tokens=6, **options)


@parametrize_pairs(prompt=["one image", "batch, unequal counts"], selector=list(SELECTORS), engine=[False, True])
def test_answers_are_those_with_a_cache(prompt, selector, engine):
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, **OPTIONS, selector=selector, engine=engine)
    wanted, report = said(model, inputs, do_sample=False), state.report
    assert any(sample.final_tokens < sample.n_visual for sample in report.samples)
    found = said(model, inputs, do_sample=False, use_cache=False)
    assert state.report.path == "plain"
    assert torch.equal(found, wanted)
    assert state.report.decode_steps == report.decode_steps == 5
    assert [one.stages for one in state.report.samples] == [one.stages for one in report.samples]
    assert state.report.flops == report.flops


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, {"keep": None, "rank_tolerance": 0.3}, {"keep": 1.0}], ids=str)
def test_ways_of_asking(options, way):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, left padding"])
    apply_sparsevlm(model, **{**OPTIONS, "selector": "sparsevlm", **options})
    assert torch.equal(said(model, inputs, **WAYS[way], use_cache=False), said(model, inputs, **WAYS[way]))


def test_another_call_chooses_for_itself():
    """One with the same prompt and more text, in particular."""

    class Counting:
        needs = frozenset({"last_attention"})
        calls = 0

        def select(self, context, n_keep):
            self.calls += 1
            return context.last_attention.topk(n_keep).indices.sort().values

    model, inputs, selector = tiny_model(), make_inputs(*PROMPTS["one image"]), Counting()
    apply_sparsevlm(model, **OPTIONS, selector=selector, target_layers=[1])
    answer = said(model, inputs, do_sample=False, use_cache=False)
    assert selector.calls == 1
    more = {name: torch.nn.functional.pad(inputs[name], (0, 6), value=value)
            for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0))}  # fmt: skip
    said(model, {**inputs, **more, "input_ids": answer}, do_sample=False, use_cache=False)
    assert selector.calls == 2
    model.model.rope_deltas = None
    with torch.no_grad():
        for ids in (inputs["input_ids"], answer):
            model(**{**inputs, **(more if ids is answer else {}), "input_ids": ids}, use_cache=False)
    assert selector.calls == 4
