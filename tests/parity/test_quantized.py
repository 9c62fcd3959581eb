"""Quantized checkpoints: what is pruned equals a masked run of the same quantized model, and the engine stands back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantized import METHODS, quantized_model
from runs import GREEDY, VARIANTS, Run, check_generated

from places import CPU, GPU
from sparsevlm import apply_sparsevlm
from toys import PROMPTS, make_inputs, relative_error

FAMILIES = ("qwen2_5_vl", "llava")
PROMPT = PROMPTS["batch, unequal counts"]


@pytest.fixture(scope="module", params=[(method, family) for method in METHODS for family in FAMILIES], ids="-".join)
def case(request, tmp_path_factory):
    """Method, family and model of a checkpoint whose package is installed."""
    name, family = request.param
    for package in METHODS[name].packages:
        pytest.importorskip(package)
    model = quantized_model(METHODS[name], family, tmp_path_factory.mktemp("checkpoint"))
    with torch.no_grad():  # some packages compute otherwise in their first call
        model(**make_inputs(*PROMPTS["one image"], family=family))
    return METHODS[name], family, model


def run_of(model, method, family, variant, place):
    """A pruned model; where activations are rounded as well, a small change can become a step of them."""
    inputs = {name: value.to(place.device) for name, value in make_inputs(*PROMPT, family=family).items()}
    if method.rounds:
        place = replace(place, tolerance=max(place.tolerance, 2e-2))
    state = apply_sparsevlm(model, **VARIANTS[variant])
    return Run(model, family, PROMPT, inputs, state, "sdpa", "dynamic", place)


@pytest.mark.parametrize("variant", ["by attention", "by span", "rank adaptive"])
def test_pruned_is_masked(case, variant):
    method, family, model = case
    run = run_of(model, method, family, variant, CPU)
    with run.state:
        check_generated(run, run.model.generate(**run.inputs, **GREEDY))


def test_the_engine_stands_back_before_the_first_call_and_after(case, tmp_path):
    """Some packages unpack their weights in the first call."""
    method, family, _ = case
    model, inputs = quantized_model(method, family, tmp_path), make_inputs(*PROMPT, family=family)
    state = apply_sparsevlm(model, **VARIANTS["by attention"], engine=True)
    outputs = []
    for _ in range(2):
        outputs.append(model.generate(**inputs, **GREEDY))
        assert state.report.path == ("plain" if method.told else "engine")
        assert f"quantized by {method.told}" in state.report.path_reason or not method.told
    state = apply_sparsevlm(model, **VARIANTS["by attention"])
    wanted = model.generate(**inputs, **GREEDY)
    for output in outputs:
        assert torch.equal(output.sequences, wanted.sequences)
        assert relative_error(torch.stack(output.logits), torch.stack(wanted.logits)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_pruned_is_masked_on_a_gpu(name, family, tmp_path):
    for package in METHODS[name].packages:
        pytest.importorskip(package)
    model = quantized_model(METHODS[name], family, tmp_path, device_map={"": 0})
    inputs = {n: value.to("cuda") for n, value in make_inputs(*PROMPT, family=family).items()}
    try:
        with torch.no_grad():
            model(**inputs)
    except (ImportError, OSError) as error:
        pytest.skip(f"a kernel of {name} is not there: {error}")
    run = run_of(
        model, METHODS[name], family, "by attention", GPU[1]
    )  # some compute in half precision whatever they are given
    output = model.generate(**run.inputs, **GREEDY)
    assert run.state.report.path == "plain"
    check_generated(run, output)
