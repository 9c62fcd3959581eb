"""Every family: what keeps all is bit-identical to dense, inside of PEFT's wrapper too, and dense comes back."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from toys import FAMILIES, PROMPTS, make_inputs, tiny_model

PRUNES = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3], "selector": "random"}
GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def logits_of(model, inputs):
    return torch.stack(model.generate(**inputs, **GREEDY).logits)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_dense_and_dense_comes_back(family, attn):
    model = tiny_model(family, attn)
    inputs = make_inputs(*PROMPTS["batch, unequal counts"], family=family)
    dense = logits_of(model, inputs)
    state = apply_sparsevlm(model, keep=1.0, selector="random", engine=False)
    assert torch.equal(logits_of(model, inputs), dense)
    with state.options(**PRUNES):
        assert not torch.equal(logits_of(model, inputs), dense)
    assert state.report.path == "plain"
    remove_sparsevlm(model)
    assert torch.equal(logits_of(model, inputs), dense)


@pytest.mark.parametrize("family", [name for name in FAMILIES if "qwen" not in name])
def test_a_model_of_peft_is_pruned_as_it_is(family):
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model(family), make_inputs(*PROMPTS["one image"], family=family)
    config = peft.LoraConfig(r=2, target_modules=r".*layers\.\d+\.self_attn\.o_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    dense = logits_of(wrapped, inputs)
    state = apply_sparsevlm(wrapped, keep=1.0, selector="random", engine=False)
    assert torch.equal(logits_of(wrapped, inputs), dense)
    with state.options(**PRUNES):
        pruned = logits_of(wrapped, inputs)
        assert state.report.samples[0].final_tokens < state.report.samples[0].n_visual
    assert not torch.equal(pruned, dense)
    remove_sparsevlm(wrapped)
    assert torch.equal(logits_of(wrapped, inputs), dense)


def test_the_report_says_why_the_engine_does_not_run():
    model, inputs = tiny_model("internvl"), make_inputs(*PROMPTS["one image"], family="internvl")
    state = apply_sparsevlm(model, **PRUNES, engine=True)
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.path == "plain"
    assert "decoder layers of InternVLForConditionalGeneration, which are not described" in state.report.path_reason
