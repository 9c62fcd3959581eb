"""Capacities and the workspace: which requests share programs, and that nothing of the last is seen by the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_parity import run

from sparsevlm import apply_sparsevlm
from sparsevlm.engine import capacities
from sparsevlm.engine.text import decode_graph, workspace
from toys import PROMPTS, make_inputs, relative_error, tiny_model

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@given(st.integers(1, 100_000))
def test_a_capacity_is_at_most_an_eighth_larger(n):
    rounded = capacities.row_capacity(n)
    assert n <= rounded < n + max(64, n / 8 + 1)
    assert capacities.row_capacity(rounded) == rounded


def test_there_are_few_capacities():
    assert len({capacities.row_capacity(n) for n in range(1, 4097)}) == 16 + 16


def test_requests_share_programs_by_capacities():
    model = tiny_model()
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], engine=True)

    def ask(n_text, height):
        model.generate(**make_inputs([("text", 3), ("image", 6, height), ("text", n_text)]), **GREEDY)
        prefill = state._engine._runner.prefill
        return len(prefill.segments), len(prefill.prune_programs), len(state._engine._runner.decode_graphs)

    first = ask(7, 6)
    assert first == (2, 1, 1)  # two segments with a cut between them
    assert ask(9, 6) == ask(7, 7) == first
    segments, cuts, graphs = ask(90, 6)
    assert (segments, cuts, graphs) == (4, 2, 1)
    assert ask(7, 6) == (4, 2, 1)
    state.detach()
    assert state._engine._runner.prefill.space is None


@pytest.mark.parametrize("selector", ["span", "random"])
def test_the_last_request_leaves_no_trace(selector, monkeypatch):
    """Nor does one that the workspace has to grow for."""
    monkeypatch.setattr(workspace, "_LEAST_ROWS", 64)
    monkeypatch.setattr(workspace, "_LEAST_BATCH", 1)
    model = tiny_model()
    prompts = [make_inputs([("text", 3), ("image", 4, 6), ("text", n)], seed=n) for n in (7, 5, 80, 8, 150, 7)]
    prompts += [make_inputs(*PROMPTS["batch, unequal counts"]), prompts[0]]
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], selector=selector)
    wanted = [model.generate(**inputs, **GREEDY) for inputs in prompts]
    with state.options(engine=True):
        for _ in range(2):
            for inputs, answer in zip(prompts, wanted, strict=True):
                assert torch.equal(model.generate(**inputs, **GREEDY), answer)


@pytest.mark.parametrize("selector", ["span", "random"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_room_is_made_as_tokens_come(device, selector, monkeypatch):
    monkeypatch.setattr(decode_graph, "_FIRST_CAPACITY", 16)
    monkeypatch.setattr(decode_graph, "_LEAST_CAPACITY", 16)
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = tiny_model().to(device, dtype)
    inputs = {name: value.to(device) for name, value in make_inputs(*PROMPTS["batch, left padding"]).items()}
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], selector=selector, engine=False)
    said, wanted = run(model, inputs, 40)
    rooms = []
    widen = decode_graph.DecodeGraph._widen
    monkeypatch.setattr(
        decode_graph.DecodeGraph, "_widen", lambda self, capacity: (rooms.append(capacity), widen(self, capacity))
    )
    with state.options(engine=True):
        for n_new in (40, 5, 40, 40):
            _, found = run(model, inputs, n_new, said)
            assert state.report.path == "engine"
            for one, other in zip(found, wanted, strict=False):
                assert relative_error(one, other) < (1e-5 if device == "cpu" else 2e-2)
            assert len(found) == n_new
    assert rooms[:3] == [16, 32, 64]
