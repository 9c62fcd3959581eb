"""Capacities and the workspace: which requests share programs, and that nothing of the last is seen by the next."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_parity import run

from sparsevlm import apply_sparsevlm
from sparsevlm.engine import capacities
from sparsevlm.engine.text import decode_graph, layer, workspace
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


@pytest.mark.parametrize("how", ["detached", "a larger request", "another weight"])
def test_memory_is_free_at_once(how, monkeypatch):
    """Before other memory is taken, and without Python's collector, which may come much later."""
    monkeypatch.setattr(workspace, "_LEAST_ROWS", 64)
    model = tiny_model()
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], engine=True)
    model.generate(**make_inputs([("text", 3), ("image", 6, 6), ("text", 7)]), **GREEDY)
    held = weakref.WeakSet([state._engine._runner.prefill.space])
    towers = weakref.WeakSet(state._engine._runner.vision._encoders._things.values())
    make, held_while_made = workspace.Workspace.__init__, []

    def see(*args):
        held_while_made.append(len(held))
        make(*args)

    monkeypatch.setattr(workspace.Workspace, "__init__", see)
    gc.disable()
    try:
        if how == "detached":
            state.detach()
        else:
            if how == "another weight":
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.generate(**make_inputs([("text", 3), ("image", 20, 20), ("text", 300)]), **GREEDY)
        assert not held
        assert bool(towers) == (how == "a larger request")  # the tower has room for it
        assert held_while_made == ([] if how == "detached" else [0])
    finally:
        gc.enable()


@pytest.mark.parametrize("selector", ["span", "random"])
@pytest.mark.parametrize("most_even", [0, 8192])
def test_the_last_request_leaves_no_trace(selector, most_even, monkeypatch):
    """Nor does one that the workspace has to grow for, or one of whose layers."""
    monkeypatch.setattr(workspace, "_LEAST_ROWS", 64)
    monkeypatch.setattr(workspace, "_MOST_EVEN", most_even)
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
            with state.options(keep=1.0):
                model.generate(**prompts[-1], **GREEDY)


def test_later_layers_of_a_large_workspace_have_room_for_what_is_left(monkeypatch):
    monkeypatch.setattr(workspace, "_LEAST_ROWS", 64)
    monkeypatch.setattr(workspace, "_MOST_EVEN", 256)
    model = tiny_model()
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[0, 2], engine=True)

    def rows_by_layer(n_text, **options):
        with state.options(**options):
            model.generate(**make_inputs([("text", 3), ("image", 16, 16), ("text", n_text)]), **GREEDY)
        space = state._engine._runner.prefill.space
        assert [own.shape[0] for own in space.keys] == [own.shape[0] for own in space.values]
        return [own.shape[0] for own in space.keys]

    first = rows_by_layer(9)
    assert first[0] >= 268 > first[1] == first[2] == first[3]
    assert rows_by_layer(20) == first
    whole = rows_by_layer(20, keep=1.0)
    assert min(whole) >= 279
    assert rows_by_layer(20) == whole


def test_a_quarter_of_many_tokens_frees_most_of_their_keys():
    """At 16384 visual tokens: 72 % of what all layers would hold."""
    drops_at_2 = (16448,) * 3 + (2688,) * 25
    room = workspace.NO_ROOM.grown(workspace.Room(16448, 1, drops_at_2))
    assert sum(room.by_layer) <= 0.28 * 28 * 16426
    assert workspace.NO_ROOM.grown(workspace.Room(4608, 1, (4608,) * 3 + (704,) * 25)).by_layer == (4608,) * 28


def test_an_mlp_in_parts_is_the_same(monkeypatch):
    rows, seen = torch.randn(150, 8), []

    def run(some):
        seen.append(some.shape[0])
        return some * 2

    whole = layer.in_parts(run, rows, 100)
    monkeypatch.setattr(layer, "_MOST_HELD", 6000)
    assert torch.equal(layer.in_parts(run, rows, 100), whole)
    assert seen == [150, 64, 64, 22]


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
