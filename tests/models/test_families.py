"""What families tell of their models, as data, and which model is whose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsevlm import apply_sparsevlm
from sparsevlm.models import adapter_for, n_tokens, supported_model_types
from sparsevlm.models.registry import FAMILIES as REGISTRY
from sparsevlm.request.costs import kv_numbers, prefill_flops
from toys import FAMILIES, IMAGE, PROMPTS, VISION_END, VISION_START, make_inputs, tiny_model

ROOMS = Path(__file__).parents[2] / "src" / "sparsevlm"


def test_every_checkpoint_type_has_a_toy():
    assert set(supported_model_types()) == {tiny_model(name).config.model_type for name in FAMILIES}


def test_a_family_is_one_file_and_a_line_of_the_registry():
    for family in REGISTRY:
        module = type(family).__module__
        named = [path.name for path in ROOMS.rglob("*.py") if type(family).__name__ in path.read_text(encoding="utf-8")]
        assert sorted(named) == sorted([module.rpartition(".")[2] + ".py", "registry.py"])


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_describes_its_model(name):
    model, toy = tiny_model(name), FAMILIES[name]
    adapter = adapter_for(model)
    assert adapter.decoder.module is toy.decoder_of(model)
    assert adapter.decoder.n_position_axes == toy.n_position_axes
    assert [getattr(layer, "self_attn", None) for layer in adapter.decoder.layers] == list(adapter.decoder.attentions)
    assert {kind: modality.token_id for kind, modality in adapter.modalities.items()} == {
        kind: one.token for kind, one in toy.kinds.items()
    }
    assert adapter.vision.module is toy.tower_of(model)
    assert (adapter.decoder.block is not None) == toy.on_engine


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_hold_as_many_tokens_as_the_prompt(name):
    model, kinds = tiny_model(name), FAMILIES[name].kinds
    adapter = adapter_for(model)
    rows = [("text", 2), ("image", 4, 6), ("text", 3), ("image", 2, 4), ("text", 1)]
    inputs = make_inputs(rows, family=name)
    layouts = adapter.family.layouts(adapter, "image", inputs)
    assert sum(map(n_tokens, layouts)) == int((inputs["input_ids"] == IMAGE).sum())
    if "video" in adapter.modalities:
        inputs = make_inputs([("video", 2, 3, 4), ("text", 4)], family=name)
        layouts = adapter.family.layouts(adapter, "video", inputs)
        assert sum(map(n_tokens, layouts)) == int((inputs["input_ids"] == kinds["video"].token).sum()) > 0
        if name == "minicpmv4_6":  # whose frames count as images
            assert layouts == [(1, 3, 4)] * 2
        elif kinds["video"].size is None and name != "kimi_k25":  # which makes one frame of all
            assert layouts == [(2, 3, 4)]


# Heads of Kimi K2.5 are no plain ones, those of Gemma 4 not all alike (test_shared_keys).
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"kimi_k25", "gemma4", "gemma4_unified"}))
def test_flops_count_the_weights_that_each_token_meets(name):
    """Of experts, those that compute it, and what chooses them."""
    model = tiny_model(name)
    adapter, config = adapter_for(model), FAMILIES[name].decoder_of(model).config
    layers = adapter.decoder.layers
    hidden, head_dim = config.hidden_size, 16
    is_hybrid = FAMILIES[name].is_hybrid  # whose attention has a gate as wide as its queries
    attention = hidden * head_dim * ((2 + is_hybrid) * config.num_attention_heads + 2 * config.num_key_value_heads)
    # Of two heads for queries and keys and four for values, of eight each: query, key, value; gate; decay and step;
    # output; and a convolution over four tokens.
    recurrent = hidden * (64 + 32 + 8 + 32) + 64 * 4
    wanted = 0
    for layer, kind in zip(layers, adapter.decoder.layer_types, strict=True):
        has_experts, of_glm = getattr(layer.mlp, "experts", None) is not None, name == "glm4v_moe"
        n_experts = has_experts and (config.n_routed_experts if of_glm else config.num_experts)
        width = config.moe_intermediate_size if n_experts else config.intermediate_size
        share = config.num_experts_per_tok + (config.n_shared_experts if of_glm else 0) if n_experts else 1
        shared = 3 * hidden * 48 + hidden if n_experts and is_hybrid else 0
        wanted += 2 * (3 * hidden * width * share + hidden * n_experts + shared)
        if kind == "linear_attention":
            wanted += 2 * recurrent + 6 * 4 * 8 * 8
        else:
            wanted += 2 * attention + 4 * config.num_attention_heads * head_dim
    assert prefill_flops(adapter, [1] * len(layers), 0) == wanted
    if "moe" in name:
        assert any(hasattr(layer.mlp, "experts") for layer in layers)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5", "gemma3", "gemma4", "gemma4_unified", "paligemma2"])
def test_keys_and_values_are_those_of_the_cache(name):
    """Of heads of several sizes, and of layers that read those of others."""
    model, inputs = tiny_model(name), make_inputs(*PROMPTS["one image"], family=name)
    cache = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    decoder, wanted = adapter_for(model).decoder, []
    for layer, source in enumerate(decoder.key_layers):
        keys = None if decoder.attentions[layer] is None else cache.layers[source].keys
        wanted.append(0 if keys is None else 2 * keys.shape[1] * keys.shape[3])
    assert kv_numbers(adapter_for(model)) == wanted


@pytest.mark.parametrize(("layer", "n_blocks"), [(-2, 3), (-1, 4), (4, 4), (2, 2), ([-2, 1], 3)])
def test_llava_reads_the_tower_up_to_the_block_that_is_taken(layer, n_blocks):
    model = tiny_model("llava")
    model.config.vision_feature_layer = layer
    vision = adapter_for(model).vision
    assert vision.n_blocks == n_blocks
    assert [index for index, _ in vision.readable] == list(range(n_blocks))


def test_llava_with_its_class_token_has_no_grid():
    model = tiny_model("llava")
    adapter = adapter_for(model)
    pixels = {"pixel_values": torch.zeros(2, 3, 56, 56)}
    assert adapter.vision.n_prefix == 1
    assert adapter.family.grids(adapter, "image", pixels) == [(1, 4, 4)] * 2
    model.config.vision_feature_select_strategy = "full"
    adapter = adapter_for(model)
    assert adapter.vision.n_prefix == 0
    assert adapter.family.grids(adapter, "image", pixels) is None


WHY_ON_HOOKS = {
    "glm4v": "a decoder of class Glm4vTextModel, which is not described",
    "glm46v": "a decoder of class Glm4vTextModel, which is not described",
    "glm4v_moe": "a decoder of class Glm4vMoeTextModel, which is not described",
    "glm_ocr": "a decoder of class GlmOcrTextModel, which is not described",
    "paddleocr_vl": "a decoder of class PaddleOCRTextModel, which is not described",
    "kimi_k25": "a decoder of class DeepseekV3Model, which is not described",
    "paligemma": "a decoder of class GemmaModel, which is not described",
    "paligemma2": "a decoder of class Gemma2Model, which is not described",
    "gemma3": "a decoder of class Gemma3TextModel, which is not described",
    "gemma4": "a decoder of class Gemma4TextModel, which is not described",
    "gemma4_unified": "a decoder of class Gemma4UnifiedTextModel, which is not described",
    "minicpmv4_6": "a decoder of class Qwen3_5TextModel, which is not described",
    "ovis2": "the way of a Ovis2ForConditionalGeneration to its decoder, which is not described",
    "qwen3_vl_moe": "a decoder of class Qwen3VLMoeTextModel, which is not described",
    "qwen3_5": "the decoder layers of Qwen3_5ForConditionalGeneration, which are not described",
    "qwen3_5_moe": "the decoder layers of Qwen3_5MoeForConditionalGeneration, which are not described",
    "qwen2_5_omni_thinker": "the decoder layers of Qwen2_5OmniThinkerForConditionalGeneration, which are not described",
    "qwen3_omni_moe_thinker":
        "the decoder layers of Qwen3OmniMoeThinkerForConditionalGeneration, which are not described",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, toy in FAMILIES.items() if not toy.on_engine])
def test_the_report_says_why_the_engine_does_not_run(name):
    model, inputs = tiny_model(name), make_inputs(*PROMPTS["one image"], family=name)
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[1, 3], engine=True)
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.path == "plain"
    assert WHY_ON_HOOKS[name] in state.report.path_reason


@pytest.mark.parametrize("name", ["qwen2_5_vl", "glm4v", "gemma3", "gemma4"])
def test_tokens_around_images_never_vote(name):
    assert {VISION_START, VISION_END} <= adapter_for(tiny_model(name)).special_token_ids


def test_features_behind_the_last_layer_are_refused():
    with pytest.raises(NotImplementedError, match=r"name 3 blocks, the decoder has 3 layers"):
        adapter_for(tiny_model("qwen3_vl", n_layers=3))


def test_gemma_3n_is_refused_with_the_reason():
    name = "Gemma3nForConditionalGeneration"
    model = type(name, (nn.Module,), {})()
    with pytest.raises(NotImplementedError, match=rf"a {name} cannot be pruned: .*several streams"):
        adapter_for(model)


def test_other_models_are_refused_with_what_is_supported():
    text = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM is not supported.*no vision tower"):
        adapter_for(text)
    with pytest.raises(
        NotImplementedError,
        match=r"Linear is .*LlavaForConditionalGeneration.*Qwen2_5_VL.*\. It is no model of transformers: pass one",
    ) as raised:
        adapter_for(nn.Linear(1, 1))
    assert "text-only" not in str(raised.value)
    with pytest.raises(TypeError, match="expected a transformers model, got str"):
        adapter_for("a/path")
