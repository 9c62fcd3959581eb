"""Buckets: which requests share one, and that nothing of the last request is seen by the next."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_parity import run

from sparsevlm import apply_sparsevlm
from sparsevlm.engine import cuda_graphs
from sparsevlm.engine.text import decode_graph, prefill_graph
from toys import PROMPTS, make_inputs, relative_error, tiny_model

GREEDY = {"max_new_tokens": 5, "do_sample": False}


@given(st.integers(1, 100_000))
def test_a_bucket_is_at_most_an_eighth_larger(n):
    rounded = cuda_graphs.round_up(n)
    assert n <= rounded < n + max(16, n / 8 + 1)
    assert cuda_graphs.round_up(rounded) == rounded


def test_requests_of_like_size_share_a_program():
    model = tiny_model()
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], engine=True)
    for seed in range(3):
        model.generate(**make_inputs(*PROMPTS["one image"], seed=seed), **GREEDY)
    pool = state._engine._runner.programs
    assert len(pool) == 1
    for n_seen in range(3):
        assert len(pool) == 1, n_seen
        model.generate(**make_inputs([("text", 90), ("image", 4, 6), ("text", 7)]), **GREEDY)
    assert len(pool) == 2
    state.detach()
    assert len(pool) == 0


@pytest.mark.parametrize("selector", ["span", "random"])
def test_the_last_request_leaves_no_trace(selector, monkeypatch):
    monkeypatch.setattr(prefill_graph, "_MOST_GRAPHS", 1)
    model = tiny_model()
    prompts = [make_inputs([("text", 3), ("image", 4, 6), ("text", n)], seed=n) for n in (7, 5, 8, 7)]
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], selector=selector)
    wanted = [model.generate(**inputs, **GREEDY) for inputs in prompts]
    with state.options(engine=True):
        for _ in range(2):
            for inputs, answer in zip(prompts, wanted, strict=True):
                assert torch.equal(model.generate(**inputs, **GREEDY), answer)
    assert len(state._engine._runner.programs if selector == "span" else state._engine._runner.decode_graphs) == 1


@pytest.mark.parametrize("selector", ["span", "random"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_room_is_made_as_tokens_come(device, selector, monkeypatch):
    monkeypatch.setattr(decode_graph, "_FIRST_CAPACITY", 16)
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
