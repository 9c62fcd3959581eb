"""What somebody else has put in the place of a model's parts and methods: it is called, or the engine stands back."""

from __future__ import annotations

import collections
import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AttentionInterface, StoppingCriteria, StoppingCriteriaList
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.quantization_config import QuantizationMethod

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BATCH = PROMPTS["batch, left padding"]
PICTURE = PROMPTS["one image"]


def features(model, inputs):
    with torch.no_grad():
        return model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[0]


@pytest.mark.parametrize("mistake", [{"foo": 1}, {"max_new_tokens": -1}])
def test_a_call_that_fails_leaves_no_picture_behind(mistake):
    model, first, second = tiny_model(), make_inputs(*PICTURE, seed=0), make_inputs(*PICTURE, seed=5)
    wanted = features(model, second)
    apply_sparsevlm(model, **OPTIONS, engine=True)
    with pytest.raises(ValueError, match=r".+"):
        model.generate(**first, **{**GREEDY, **mistake})
    torch.testing.assert_close(features(model, second), wanted, rtol=1e-5, atol=1e-5)


def test_other_pictures_may_be_encoded_in_the_middle():
    model, first, second = tiny_model(), make_inputs(*PICTURE, seed=0), make_inputs(*PICTURE, seed=5)
    wanted, seen = features(model, second), []
    apply_sparsevlm(model, **OPTIONS, engine=True)

    class Streamer:
        def put(self, value):
            seen.append(features(model, second))

        def end(self):
            pass

    answer = model.generate(**first, **GREEDY, streamer=Streamer())
    assert len(seen) == 7  # the prompt and every new token
    for found in seen:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    remove_sparsevlm(model)
    apply_sparsevlm(model, **OPTIONS)
    assert torch.equal(model.generate(**first, **GREEDY), answer)


@pytest.mark.parametrize("engine", [False, True])
def test_embeddings_given_by_the_caller(engine):
    model, inputs = tiny_model(), make_inputs(*PICTURE)
    ids = inputs.pop("input_ids")
    given = {**inputs, "inputs_embeds": model.get_input_embeddings()(ids).detach(), **GREEDY}
    state = apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**given)
    with state.options(engine=engine):
        assert torch.equal(model.generate(**given), wanted)
    assert state.report.path == "plain"


def halved(module, query, key, value, mask, **kwargs):
    mixed, weights = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return mixed * 0.5, weights


def subclass(module):
    class Own(type(module)):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            return (found[0] * 0.5, *found[1:]) if isinstance(found, tuple) else found * 0.5

    module.__class__ = Own


def change_number(model, what):
    attention, norm = (getattr(model.model.language_model.layers[1], name) for name in ("self_attn", "input_layernorm"))
    if what == "scale of scores":
        attention.scaling *= 4
    elif what == "epsilon of a norm":
        norm.variance_epsilon = 0.5
    elif what == "window of the tower":
        model.model.visual.window_size //= 2


def replace(model, what):
    change_number(model, what)
    layers, blocks = model.model.language_model.layers, model.model.visual.blocks
    if what == "attention function":
        AttentionInterface.register("halved", halved)
        model.model.language_model.config._attn_implementation = "halved"
    elif what == "attention class":
        subclass(layers[1].self_attn)
    elif what == "norm class":
        subclass(layers[1].input_layernorm)
    elif what == "MLP class":
        subclass(layers[1].mlp)
    elif what == "block class":
        subclass(blocks[1].mlp)
    elif what == "activation of the tower":
        for block in blocks:
            block.mlp.act_fn = torch.nn.GELU()
    elif what == "shared queries":
        layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    elif what == "gate is up":
        layers[1].mlp.up_proj.weight = layers[1].mlp.gate_proj.weight
    elif what == "encoding":
        own = model.model.get_image_features
        model.model.get_image_features = functools.partial(own)
    elif what == "positions of an image":
        own = model.model.get_vision_position_ids
        model.model.get_vision_position_ids = lambda *args, **kwargs: own(*args, **kwargs) + 1
    elif what == "inputs of a step":
        own = model.prepare_inputs_for_generation
        model.prepare_inputs_for_generation = types.MethodType(
            lambda self, *args, **kwargs: own(*args, **kwargs), model
        )


REPLACED = {
    "attention function": "plain", "attention class": "plain", "norm class": "plain", "MLP class": "plain",
    "block class": "engine", "activation of the tower": "engine", "shared queries": "engine", "gate is up": "engine",
    "encoding": "plain", "inputs of a step": "plain", "scale of scores": "engine", "epsilon of a norm": "engine",
    "window of the tower": "engine", "positions of an image": "plain",
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", REPLACED)
def test_what_was_replaced_counts(what, when):
    model, inputs = tiny_model(), make_inputs(*BATCH)
    if when == "before":
        replace(model, what)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    if when == "after":
        model.generate(**inputs, **GREEDY)
        replace(model, what)
    found = model.generate(**inputs, **GREEDY)
    assert state.report.path == REPLACED[what], state.report.path_reason
    with state.options(engine=False):
        assert torch.equal(model.generate(**inputs, **GREEDY), found)


@pytest.mark.parametrize("how", ["one", "all"])
def test_layers_that_were_replaced_are_told_on_hooks(how):
    model, inputs = tiny_model(), make_inputs(*BATCH)
    decoder = model.model.language_model
    apply_sparsevlm(model, **OPTIONS, engine=False)
    if how == "one":
        decoder.layers[1] = copy.deepcopy(decoder.layers[1])
    else:
        decoder.layers = copy.deepcopy(decoder.layers)
    with pytest.raises(RuntimeError, match=r"layers were replaced .* Call apply_sparsevlm\(model\) again"):
        model.generate(**inputs, **GREEDY)
    state = apply_sparsevlm(model, **OPTIONS, engine=False)
    model.generate(**inputs, **GREEDY)
    assert state.report.samples[0].stages[-1].kept


class FP8Linear(nn.Linear):
    """Stands for a layer of a quantized checkpoint."""


@pytest.mark.parametrize("how", ["layers", "weights"])
def test_a_checkpoint_that_came_quantized_is_told(how):
    model, inputs = tiny_model(), make_inputs(*BATCH)
    wanted = "a FP8Linear in the place of a linear layer (quantized by fp8; the engine runs weights in bfloat16"
    if how == "layers":
        for layer in model.model.language_model.layers:
            layer.mlp.down_proj.__class__ = FP8Linear
    else:
        wanted = wanted.replace("a FP8Linear in the place of a linear layer", "a Packed in the place of a weight")
        linear = model.model.language_model.layers[1].mlp.down_proj
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(Packed))
    model.quantization_method = QuantizationMethod.FP8
    state = apply_sparsevlm(model, **OPTIONS, engine=True, weights="fp8")
    found = model.generate(**inputs, **GREEDY)
    assert state.report.path == "plain"
    assert wanted in state.report.path_reason
    assert "weights='fp8')" in state.report.path_reason
    remove_sparsevlm(model)
    apply_sparsevlm(model, **OPTIONS)
    assert torch.equal(model.generate(**inputs, **GREEDY), found)


@pytest.mark.parametrize("part", ["decoder", "tower"])
def test_weights_that_are_fetched_from_elsewhere_are_left_alone(part):
    """As compressed-tensors does: linear layers of the usual class, with another forward and another store."""
    model, inputs = tiny_model(), make_inputs(*PICTURE)
    apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**inputs, **GREEDY)
    remove_sparsevlm(model)
    parts = (
        [model.model.language_model.layers[i].mlp.up_proj for i in range(3)]
        if part == "decoder"
        else [block.attn.proj for block in model.model.visual.blocks]
    )
    for linear in parts:
        linear.forward = functools.partial(nn.Linear.forward, linear)
        linear._parameters = collections.UserDict(linear._parameters)
    model.quantization_method = QuantizationMethod.COMPRESSED_TENSORS
    places = [linear.weight.data_ptr() for linear in parts]
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        assert [linear.weight.data_ptr() for linear in parts] == places
    if part == "decoder":
        assert "a Linear whose forward was replaced (quantized by compressed-tensors; the" in state.report.path_reason


class Packed(torch.Tensor):
    """Stands for the weight of a quantized layer."""


def test_hooks_on_all_modules_run():
    model, inputs, seen = tiny_model(), make_inputs(*BATCH), set()
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    handle = register_module_forward_pre_hook(lambda module, args: seen.add(type(module).__name__))
    try:
        model.generate(**inputs, **GREEDY)
    finally:
        handle.remove()
    assert "Qwen2_5_VLDecoderLayer" in seen
    assert "hooks on all modules" in state.report.path_reason


def test_a_class_that_was_patched_is_called(monkeypatch):
    model, inputs, calls = tiny_model(), make_inputs(*BATCH), []
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    kind = type(model.model.language_model.layers[0].mlp)
    own = kind.forward

    def counted(self, hidden):
        calls.append(1)
        return own(self, hidden)

    monkeypatch.setattr(kind, "forward", counted)
    model.generate(**inputs, **GREEDY)
    assert calls
    assert "was replaced" in state.report.path_reason


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
def test_a_patch_made_since_stays_when_all_is_removed(name):
    model, inputs = tiny_model(), make_inputs(*BATCH)
    wanted = model.generate(**inputs, **GREEDY)
    apply_sparsevlm(model, **OPTIONS, engine=True)
    model.generate(**inputs, **GREEDY)
    own, calls = getattr(model, name), []

    def patch(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    setattr(model, name, patch)
    remove_sparsevlm(model)
    assert vars(model)[name] is patch
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    assert calls


def test_generate_inside_of_generate():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    inner = make_inputs(*PICTURE, seed=3)
    state = apply_sparsevlm(model, **OPTIONS)
    wanted = [model.generate(**one, **GREEDY) for one in (inputs, inner)]
    found = []

    class Asks(StoppingCriteria):
        n_calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.n_calls += 1
            if self.n_calls == 3:
                found.append(model.generate(**inner, **GREEDY))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with state.options(engine=True):
        answer = model.generate(**inputs, **GREEDY, stopping_criteria=StoppingCriteriaList([Asks()]))
        assert torch.equal(answer, wanted[0])
        assert torch.equal(found[0], wanted[1])
        assert torch.equal(model.generate(**inner, **GREEDY), wanted[1])
        assert state.report.path == "engine"


def test_a_class_with_a_generate_of_its_own():
    model, inputs = tiny_model(), make_inputs(*BATCH)

    class Own(type(model)):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    model.__class__ = Own
    state = apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**inputs, **GREEDY)
    with state.options(engine=True):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
            assert state.report.path == "engine"


def test_positions_of_two_dimensions():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    found = model.generate(**inputs, **GREEDY, position_ids=positions)
    assert "position_ids" in state.report.path_reason
    with state.options(engine=False):
        assert torch.equal(model.generate(**inputs, **GREEDY, position_ids=positions), found)


def test_a_share_of_the_tower_that_is_not_computed_is_told():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["image and video"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True, vision_keep=0.5)
    model.generate(**inputs, **GREEDY)
    assert "the tower computed all" in state.report.path_reason
    model.generate(**make_inputs(*BATCH), **GREEDY)
    assert "the tower computed all" not in state.report.path_reason


def test_the_tower_gives_a_tuple_where_one_is_asked_for():
    model, inputs = tiny_model(), make_inputs(*PICTURE)
    apply_sparsevlm(model, **OPTIONS, engine=True)
    with torch.no_grad():
        found = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=False)
    assert isinstance(found, tuple)


def test_copies_have_stand_ins_of_their_own():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    apply_sparsevlm(model, **OPTIONS, engine=True)
    wanted = model.generate(**inputs, **GREEDY)
    twin = copy.deepcopy(model)
    remove_sparsevlm(model)
    assert torch.equal(twin.generate(**inputs, **GREEDY), wanted)
    remove_sparsevlm(twin)
    assert "generate" not in vars(twin)
