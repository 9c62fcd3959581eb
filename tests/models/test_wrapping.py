"""Models inside of wrappers (PEFT's, torch's), compiled models, and what is no model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsevlm.models.wrapping
from sparsevlm import apply_sparsevlm, remove_sparsevlm
from toys import FAMILIES, ON_ENGINE, PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "selector": "sparsevlm", "target_layers": [1]}
ONE = PROMPTS["one image"]


class Pipeline:
    def __init__(self, model):
        self.model = model


NO_MODULES = {
    "nothing": (lambda: None, r"got NoneType\."),
    "a name": (lambda: "Qwen/Qwen2.5-VL-3B", r"got str \('Qwen/Qwen2.5-VL-3B'\): load the model first"),
    "a class": (lambda: nn.Linear, "got the class Linear itself: make a model of it first"),
    "a pipeline": (lambda: Pipeline(nn.Linear(2, 2)), "got Pipeline: pass its model, Pipeline.model, a Linear"),
}


@pytest.mark.parametrize("call", [apply_sparsevlm, remove_sparsevlm])
@pytest.mark.parametrize("case", NO_MODULES)
def test_what_is_no_module_is_named(case, call):
    make, message = NO_MODULES[case]
    with pytest.raises(TypeError, match=f"expected a transformers model, {message}"):
        call(make())


def test_a_module_that_nothing_was_applied_to_is_left_alone():
    for module in (nn.Linear(2, 2), tiny_model(), nn.DataParallel(tiny_model())):
        remove_sparsevlm(module)


class Spread(nn.Module):
    """As DistributedDataParallel and FSDP hold a model, which need a process group to be made."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Larger(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.vlm = model


@pytest.mark.parametrize("wrap", [nn.DataParallel, Spread])
def test_spread_models_name_what_they_wrap(wrap):
    model = tiny_model()
    with pytest.raises(NotImplementedError, match=r"pass what it wraps, model\.module"):
        apply_sparsevlm(wrap(model))
    state = apply_sparsevlm(model, **OPTIONS)
    with pytest.raises(ValueError, match=r"a Qwen2_5_VLForConditionalGeneration in or around it.*model\.module"):
        remove_sparsevlm(wrap(model))
    assert state.attached


@pytest.mark.parametrize("part", [Larger, lambda model: model.model, lambda model: nn.ModuleList([model])])
def test_removal_from_what_holds_the_model_or_is_its_part_is_not_silent(part):
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    with pytest.raises(ValueError, match="is not what prunes, but a Qwen2_5_VLForConditionalGeneration in or around"):
        remove_sparsevlm(part(model))
    assert state.attached
    remove_sparsevlm(model)
    remove_sparsevlm(part(model))


def peft_model(kind, family="qwen2_5_vl"):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "o_proj"],
        exclude_modules=r".*vision_tower.*" if family == "gemma4" else None,  # peft takes no linears that clip
        init_lora_weights=False,
        task_type="CAUSAL_LM" if kind == "causal" else None,
    )
    return peft.get_peft_model(tiny_model(family), config, mixed=kind == "mixed").eval()


def hooks_of(model):
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize(
    ("kind", "family", "engine"),
    [
        *((kind, "qwen2_5_vl", engine) for kind in ("plain", "mixed") for engine in (False, True)),
        *(("causal", name, False) for name in FAMILIES),
        *(("causal", name, True) for name in ON_ENGINE),
    ],
)
def test_a_peft_model_prunes_through_its_wrapper(kind, family, engine):
    model, inputs = peft_model(kind, family), make_inputs(*ONE, family=family)
    bare = tiny_model(family)
    without = apply_sparsevlm(bare, **OPTIONS)
    bare.generate(**inputs, max_new_tokens=1)
    assert 0 < without.report.final_tokens < without.report.n_visual
    dense = model.generate(**inputs, max_new_tokens=4)
    n_hooks = hooks_of(model)
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    model.generate(**inputs, max_new_tokens=4)
    kept = state.report.final_tokens
    assert (state.report.n_visual, kept) == (without.report.n_visual, without.report.final_tokens)
    model(**inputs)
    assert state.report.final_tokens == kept
    again = apply_sparsevlm(model, **OPTIONS, engine=engine)
    assert (state.attached, again.attached) == (False, True)
    remove_sparsevlm(model)
    assert not again.attached
    assert hooks_of(model) == n_hooks
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), dense)


def test_an_adapter_that_comes_after_is_pruned_as_well():
    peft = pytest.importorskip("peft")
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    wrapped.generate(**inputs, max_new_tokens=2)
    assert state.report.final_tokens == 9
    remove_sparsevlm(wrapped)
    assert not state.attached


def test_a_wrapper_of_peft_is_known_by_its_class(monkeypatch):
    """Without the package: what tells a wrapper is its class, not that it has a base model."""

    class PeftModel(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

        def get_base_model(self):
            return self.base_model

    package = type("peft", (), {"PeftModel": PeftModel})
    model = tiny_model()
    wrapper = PeftModel(model)
    assert sparsevlm.models.wrapping.unwrap(wrapper) is wrapper
    monkeypatch.setitem(sparsevlm.models.wrapping.sys.modules, "peft", package)
    assert sparsevlm.models.wrapping.unwrap(wrapper) is model
    assert sparsevlm.models.wrapping.unwrap(model) is model


def compile_layers(model):
    for layer in model.model.language_model.layers:
        layer.compile(backend="eager")


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compile_decoder(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")


def compile_base(model):
    model.model = torch.compile(model.model, backend="eager")


SHALLOW = {"n_layers": 2, "vision_options": {"depth": 1, "fullatt_block_indexes": [0]}}
EARLY = {**OPTIONS, "target_layers": [0]}
COMPILED = {
    "forward": (compile_forward, "Qwen2_5_VLForConditionalGeneration is compiled"),
    "decoder": (compile_decoder, "model.language_model is compiled"),
    "base": (compile_base, "model is compiled"),
    "layers": (compile_layers, "layers.0, model.language_model.layers.1, model.language_model.layers.2 is compiled"),
    "model": (lambda model: model.compile(backend="eager"), "Qwen2_5_VLForConditionalGeneration is compiled"),
}


@pytest.mark.parametrize("case", COMPILED)
def test_a_compiled_model_is_said_to_be_one(case, caplog):
    make, message = COMPILED[case]
    model = tiny_model()
    make(model)
    state = apply_sparsevlm(model, **OPTIONS)
    assert f"{message}, and hooks break its graph" in caplog.text
    state.detach()
    assert not hasattr(model.model, "_sparsevlm_state")


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_a_compiled_and_used_decoder_prunes():
    """By a direct call of few layers: compiling takes its time."""
    inputs, plain, model = make_inputs(*ONE), tiny_model(**SHALLOW), tiny_model(**SHALLOW)
    apply_sparsevlm(plain, **EARLY)
    compile_decoder(model)
    with torch.no_grad():
        wanted, dense = plain(**inputs).logits, model(**inputs).logits
        assert not torch.equal(dense, wanted)
        state = apply_sparsevlm(model, **EARLY)
        assert torch.equal(model(**inputs).logits, wanted)
        assert state.report.final_tokens == 4
        remove_sparsevlm(model)
        assert torch.equal(model(**inputs).logits, dense)


def test_a_compiled_wrapper_is_refused_with_the_remedy():
    """Not run: it holds a graph of the whole model, whose making takes half a minute."""
    model = tiny_model()
    wrapper = torch.compile(model, backend="eager")
    with pytest.raises(NotImplementedError, match=r"pass the original, before torch\.compile"):
        apply_sparsevlm(wrapper, **OPTIONS)
    assert apply_sparsevlm(model, **OPTIONS).attached


def test_parts_without_hooks_may_be_compiled(caplog):
    model = tiny_model()
    for layer in model.model.language_model.layers:
        layer.mlp.compile(backend="eager")
    apply_sparsevlm(model, **OPTIONS)
    assert "compiled" not in caplog.text


@pytest.mark.parametrize("compiled", ["something", "nothing", "who knows"])
def test_what_was_compiled_is_forgotten_where_something_was(compiled, monkeypatch):
    """It takes seconds on a GPU."""
    torch.compiler.reset()
    if compiled == "something":
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    elif compiled == "who knows":
        monkeypatch.setattr("torch._dynamo.convert_frame.input_codes", object())
    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(1))
    apply_sparsevlm(tiny_model(), **OPTIONS).detach()
    assert forgotten == [1] * (compiled != "nothing")
