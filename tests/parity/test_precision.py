"""Half precision on the CPU, and models that go to another dtype or device under pruning."""

from __future__ import annotations

import pytest
import torch
from runs import GREEDY, VARIANTS, build, check_generated

from places import Place
from sparsevlm import apply_sparsevlm
from toys import PROMPTS, make_inputs, relative_error, tiny_model

HALF = [Place("cpu", torch.bfloat16, 6e-2), Place("cpu", torch.float16, 1e-2)]
SOME = ("qwen2_5_vl", "llava", "qwen3_vl", "gemma3", "qwen3_5", "mistral3")


@pytest.mark.parametrize("variant", ["by attention", "rank adaptive"])
@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("half", HALF, ids=str)
def test_half_precision_on_the_cpu(half, family, variant):
    run = build(PROMPTS["batch, left padding"], VARIANTS[variant], half, family=family)
    check_generated(run, run.model.generate(**run.inputs, **GREEDY))


def answer(model, inputs):
    """Tokens and logits of a call of a model that prunes."""
    output = model.generate(**inputs, **GREEDY)
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3"])
def test_another_dtype_while_it_prunes(family, engine):
    """There and back, with a call after each."""
    check_moves(family, engine, [torch.float32, torch.bfloat16, torch.float16, torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3"])
def test_another_device_while_it_prunes(family):
    """The engine takes over on the GPU, if it runs the family at all."""
    check_moves(family, None, ["cpu", "cuda", torch.bfloat16, "cpu"])


def check_moves(family, engine, places):
    """Compare a model that is moved under pruning with one that is moved before."""
    model, other = tiny_model(family), tiny_model(family)
    state = apply_sparsevlm(model, **VARIANTS["by attention"], engine=engine)
    for place in places:
        inputs = {n: v.to(model.to(place).device) for n, v in make_inputs(*PROMPTS["one image"], family=family).items()}
        sequences, logits = answer(model, inputs)
        with apply_sparsevlm(other.to(place), **VARIANTS["by attention"], engine=engine) as fresh:
            wanted_sequences, wanted = answer(other, inputs)
            assert state.report.samples == fresh.report.samples
            assert state.report.path == fresh.report.path
        if model.device.type == "cpu":
            assert torch.equal(sequences, wanted_sequences)
        # On a GPU one may run by a graph already, and the other not yet.
        assert relative_error(logits[0], wanted[0]) <= (1e-6 if model.device.type == "cpu" else 2e-2)
