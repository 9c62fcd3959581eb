"""Copies and pickles of an applied model: they prune by themselves, and are whole after removal."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm, remove_sparsevlm
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3}
ONE = PROMPTS["one image"]
# span looks at hidden states, visionzip into the vision tower, sparsevlm at the attention of target layers.
SELECTORS = ("span", "visionzip", "sparsevlm")


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def names_of_attention(model):
    return {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}


def check_whole(model, inputs, dense):
    """As if nothing had ever been applied."""
    remove_sparsevlm(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert names_of_attention(model) == {"sdpa"}
    assert model.model.language_model.layers[2].self_attn.config is model.config.text_config
    assert model.model.visual.blocks[-1].attn.config is model.config.vision_config
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), dense)


@parametrize_pairs(is_used=[False, True], selector=list(SELECTORS), engine=[False, True], make=list(COPIES))
def test_a_copy_prunes_as_the_model_and_is_whole_after_removal(is_used, selector, engine, make):
    model, inputs = tiny_model(), make_inputs(*ONE)
    dense = model.generate(**inputs, max_new_tokens=4)
    state = apply_sparsevlm(model, **OPTIONS, selector=selector, engine=engine)
    if is_used:
        model.generate(**inputs, max_new_tokens=4)
    twin = COPIES[make](model)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_new_tokens=4))
    own = twin.model._sparsevlm_state
    assert own is not state
    assert own.report.samples == state.report.samples
    assert own.report.final_tokens < 24
    check_whole(twin, inputs, dense)
    assert state.attached


def answer(model, inputs, queue):
    tokens = model.generate(**inputs, max_new_tokens=4).tolist()
    queue.put((tokens, model.model._sparsevlm_state.report.final_tokens))


def test_a_spawned_process_takes_an_applied_model():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS, selector="visionzip")
    wanted = model.generate(**inputs, max_new_tokens=4).tolist()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(model, inputs, queue))
    process.start()
    assert queue.get(timeout=120) == (wanted, state.report.final_tokens)
    process.join(timeout=60)
    assert process.exitcode == 0


def interrupt(module, args):
    raise KeyboardInterrupt


CALLS = {
    "generate": lambda model, inputs: model.generate(**inputs, max_new_tokens=4),
    "beams": lambda model, inputs: model.generate(**inputs, max_new_tokens=4, num_beams=2),
    "forward": lambda model, inputs: model(**inputs),
}
PLACES = {
    "tower": lambda model: model.model.visual.blocks[-1].attn.qkv,
    "target layer": lambda model: model.model.language_model.layers[2].self_attn.q_proj,
    "after the pass": lambda model: model.lm_head,
}


@parametrize_pairs(
    selector=list(SELECTORS), where=list(PLACES), call=list(CALLS), engine=[False, True], make=["deepcopy", "pickle"]
)
def test_a_copy_taken_after_an_interruption_is_whole(selector, where, call, engine, make):
    model, inputs = tiny_model(), make_inputs(*ONE)
    dense = model.generate(**inputs, max_new_tokens=4)
    apply_sparsevlm(model, **OPTIONS, selector=selector, engine=engine)
    handle = PLACES[where](model).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        CALLS[call](model, inputs)
    handle.remove()
    twin = COPIES[make](model)
    check_whole(twin, inputs, dense)
    check_whole(model, inputs, dense)
