"""Decoders are described to the engine by class: what is not known runs on hooks, with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import MistralConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from sparsevlm import apply_sparsevlm, register_adapter
from sparsevlm.models import adapter_for, registry
from toys import FAMILIES, ON_ENGINE, PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6, "engine": True}


def reason_of(model, family="internvl"):
    """Why a call runs on hooks; empty on the engine."""
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**make_inputs(*PROMPTS["one image"], family=family), max_new_tokens=1)
    return "" if state.report.path == "engine" else state.report.path_reason


class SomeNorm(Qwen3RMSNorm):
    """May do anything."""


class SomeModel(Qwen2Model):
    """May do anything between its layers."""


def another_norm(text):
    text.layers[3].input_layernorm = SomeNorm(64)


def another_head_norm(text):
    text.layers[2].self_attn.k_norm = GemmaRMSNorm(16)


def another_last_norm(text):
    text.norm = GemmaRMSNorm(64)


def another_mlp(text):
    text.layers[1].mlp = nn.Identity()


def another_rotation(text):
    text.rotary_emb.rope_type = "longrope"


def part_of_the_head(text):
    text.rotary_emb.inv_freq = text.rotary_emb.inv_freq[:4]


CHANGES = {
    another_norm: "a SomeNorm in the decoder in the place of a Qwen3RMSNorm",
    another_head_norm: "a GemmaRMSNorm in the decoder in the place of a Qwen3RMSNorm",
    another_last_norm: "a GemmaRMSNorm in the decoder in the place of a Qwen3RMSNorm",
    another_mlp: "a Identity in the decoder in the place of a Qwen3MLP",
    another_rotation: "rotary positions of type 'longrope', whose tables depend on more than the position",
    part_of_the_head: "heads of 16 numbers beside 8 that are rotated",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_is_not_known(change):
    model = tiny_model("internvl")
    assert adapter_for(model).decoder.block is not None
    change(model.model.language_model)
    decoder = adapter_for(model).decoder
    assert (decoder.block, decoder.undescribed) == (None, CHANGES[change])


@pytest.mark.parametrize("change", [another_norm, another_last_norm])
def test_a_part_that_is_exchanged_later(change):
    model = tiny_model("internvl")
    assert not reason_of(model)
    change(model.model.language_model)
    assert CHANGES[change] in reason_of(model)


def test_a_layer_or_a_model_that_is_derived():
    model = tiny_model("llava_onevision")
    text = model.model.language_model
    text.layers[5].__class__ = type("SomeLayer", (Qwen2DecoderLayer,), {})
    assert adapter_for(model).decoder.undescribed == "a SomeLayer in the decoder in the place of a Qwen2DecoderLayer"
    text.layers[5].__class__ = Qwen2DecoderLayer
    text.__class__ = SomeModel
    assert adapter_for(model).decoder.undescribed == "a decoder of class SomeModel, which is not described"


def test_a_sliding_window():
    model = tiny_model("mistral3", text_options={"sliding_window": 12})
    assert isinstance(model.config.text_config, MistralConfig)
    assert "decoder layers with a sliding window" in reason_of(model, "mistral3")


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_rotary_scaling(kind):
    """Tables of the position alone are the rotary module's own."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8} if kind == "longrope" else {}
    model, inputs = (
        tiny_model("llava", text_options={"rope_parameters": rope}),
        make_inputs(*PROMPTS["two images"], family="llava"),
    )
    state = apply_sparsevlm(model, **OPTIONS)
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    report = state.report
    with state.options(engine=False):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), found)
    assert report.path == ("plain" if kind == "longrope" else "engine")
    assert ("rotary positions of type 'longrope'" in report.path_reason) == (kind == "longrope")


@pytest.mark.parametrize("n_new", [4, 40])
def test_rotary_positions_that_change_behind_the_length_of_training(n_new):
    """As in InternVL 3; also where a longer call has changed them before."""
    options = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 40,
    }
    model = tiny_model("internvl", text_options=options)
    inputs = make_inputs(*PROMPTS["one image"], family="internvl")
    state = apply_sparsevlm(model, **OPTIONS)
    lengths = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
    found = model.generate(**inputs, **lengths)
    report = state.report
    with state.options(engine=False):
        assert torch.equal(model.generate(**inputs, **lengths), found)
    assert report.path == ("engine" if n_new == 4 else "plain")
    assert ("more than the 40 positions" in report.path_reason) == (n_new == 40)
    again, short = model.generate(**inputs, max_new_tokens=4, do_sample=False), state.report
    assert short.path == "engine"
    assert torch.equal(again, found[:, : again.shape[1]])


def test_biases():
    model = tiny_model("llava", text_options={"attention_bias": True, "mlp_bias": True})
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    inputs = make_inputs(*PROMPTS["batch, left padding"], family="llava")
    state = apply_sparsevlm(model, **OPTIONS)
    found = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert state.report.path == "engine"
    with state.options(engine=False):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), found)


def test_a_family_of_the_users_runs_on_hooks_unless_it_says_how_images_are_encoded(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    (family,) = (family for family in registry.FAMILIES if "internvl" in family.model_types)
    assert not reason_of(tiny_model("internvl"))
    register_adapter("InternVLForConditionalGeneration", dataclasses.replace(family, encoder_inputs=None))
    assert "the way of a InternVLForConditionalGeneration to its decoder" in reason_of(tiny_model("internvl"))


def test_the_engine_runs_those_that_are_known():
    assert set(ON_ENGINE) == {
        "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl", "smolvlm",
        "idefics3", "deepseek_vl", "mistral3", "lighton_ocr",
    }  # fmt: skip
    assert {name for name, toy in FAMILIES.items() if toy.tower_on_engine} == {"qwen2_5_vl", "qwen2_vl", "qwen3_vl"}
