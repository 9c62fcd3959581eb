"""Models that no family of the library has: registered, found by structure, or refused with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from torch import nn

from sparsevlm import apply_sparsevlm, compat, register_adapter, remove_sparsevlm
from sparsevlm.models import adapter_for, registry, supported_model_types
from sparsevlm.models.refused import REFUSED
from sparsevlm.models.tiled import TiledFamily
from toys import PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3], "selector": "random", "min_keep_per_image": 0}
ALIKE = ("internvl", "smolvlm", "mistral3", "deepseek_vl", "paddleocr_vl", "kimi_k25", "glm4v")


@pytest.fixture
def unknown(monkeypatch):
    """Nothing is supported."""
    monkeypatch.setattr(registry, "FAMILIES", ())
    monkeypatch.setattr(registry, "_REGISTERED", {})


def logits_of(model, inputs, **options):
    state = apply_sparsevlm(model, **OPTIONS, **options)
    output = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert state.report.samples[0].final_tokens < state.report.samples[0].n_visual
    return torch.stack(output.logits)


@pytest.mark.parametrize("prompt", ["two images", "batch, left padding"])
@pytest.mark.parametrize("name", ALIKE)
def test_a_generic_model_is_pruned_as_a_described_one(name, prompt, monkeypatch):
    model, inputs = tiny_model(name), make_inputs(*PROMPTS[prompt], family=name)
    wanted = logits_of(model, inputs)
    remove_sparsevlm(model)
    monkeypatch.setattr(registry, "FAMILIES", ())
    assert torch.equal(logits_of(model, inputs, family="generic"), wanted)


def test_the_proof_is_made_once(unknown):
    model, inputs = tiny_model("internvl"), make_inputs(*PROMPTS["one image"], family="internvl")
    runs = []
    model.model.language_model.register_forward_pre_hook(lambda *args: runs.append(1))
    apply_sparsevlm(model, **OPTIONS, family="generic")
    n_runs = []
    for _ in range(2):
        runs.clear()
        model.generate(**inputs, max_new_tokens=2)
        n_runs.append(len(runs))
    assert n_runs == [4, 2]
    runs.clear()
    apply_sparsevlm(model, **OPTIONS, family="generic")
    with torch.no_grad():
        model(**inputs)
    assert len(runs) == 3


class OnPlaces(nn.Module):
    """A layer that looks at where its rows are."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.self_attn = layer, layer.self_attn

    def forward(self, hidden_states, **kwargs):
        if (ids := kwargs.get("position_ids")) is not None:
            hidden_states = hidden_states + 0.1 * ids[..., None]
        return self.layer(hidden_states, **kwargs)


def test_a_model_that_does_not_prove_itself_is_refused(unknown):
    model, inputs = tiny_model("internvl"), make_inputs(*PROMPTS["one image"], family="internvl")
    layers = model.model.language_model.layers
    layers[2] = OnPlaces(layers[2])
    state = apply_sparsevlm(model, **OPTIONS, family="generic")
    with pytest.raises(NotImplementedError, match=r"image token 90, a Qwen3Model of 6 layers .* states change by"):
        model.generate(**inputs, max_new_tokens=1)
    assert "NotImplementedError" in state.report.failed


def test_more_for_each_token_is_refused(unknown):
    model, inputs = tiny_model("internvl"), make_inputs(*PROMPTS["one image"], family="internvl")
    layer = model.model.language_model.layers[1]

    def adds(module, args, kwargs):
        return args, {**kwargs, "per_layer_input": torch.zeros(args[0].shape[:2])}

    layer.register_forward_pre_hook(adds, with_kwargs=True)
    apply_sparsevlm(model, **OPTIONS, family="generic")
    layer.register_forward_pre_hook(adds, with_kwargs=True, prepend=True)
    with pytest.raises(NotImplementedError, match=r"more for each token \(per_layer_input\)"):
        model.generate(**inputs, max_new_tokens=1)


def test_what_is_not_found_is_said(unknown):
    model = tiny_model("internvl")
    del model.model.vision_tower
    with pytest.raises(NotImplementedError, match=r"does not find in this InternVL\w+: a vision tower \(visual"):
        apply_sparsevlm(model, family="generic")
    with pytest.raises(ValueError, match=r"family must be None or 'generic', got 'internvl'"):
        apply_sparsevlm(tiny_model("internvl"), family="internvl")


@pytest.mark.parametrize("family", [None, "generic"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused_with_the_reason(name, family):
    model = type(name, (nn.Module,), {})()
    with pytest.raises(NotImplementedError, match=rf"a {name} cannot be pruned: .*\. \w+"):
        adapter_for(model, family)


def test_any_encoder_decoder_is_refused():
    model = nn.Module()
    model.config = type("Config", (), {"is_encoder_decoder": True})()
    with pytest.raises(NotImplementedError, match="a Module cannot be pruned: its text layers attend"):
        adapter_for(model, "generic")


@pytest.mark.skipif(transformers.__version__ != compat.NEWEST, reason="older transformers do not have all of them")
def test_refused_classes_are_those_of_transformers():
    assert not [name for name in REFUSED if not hasattr(transformers, name)]


def test_a_registered_class_is_pruned(unknown):
    model, inputs = tiny_model("internvl"), make_inputs(*PROMPTS["one image"], family="internvl")
    with pytest.raises(NotImplementedError, match=r"family='generic' tries any other"):
        apply_sparsevlm(model, **OPTIONS)
    mine = TiledFamily(("mine",), ("InternVLForConditionalGeneration",), merge="downsample_ratio")
    register_adapter("InternVLForConditionalGeneration", mine)
    assert supported_model_types() == ("mine",)
    wanted = logits_of(model, inputs)
    register_adapter("InternVLForConditionalGeneration", dataclasses.replace(mine, model_types=("other",)))
    assert supported_model_types() == ("other",)
    assert relative_error(logits_of(model, inputs), wanted) == 0
    for name, family in (("my model", mine), (None, mine), ("Mine", type(mine)), ("Mine", "generic")):
        with pytest.raises(TypeError, match="must be"):
            register_adapter(name, family)
