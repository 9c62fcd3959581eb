"""The benchmark measures what it says, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.bench import gate, shapes
from sparsevlm.bench.cases import CORE, FULL, N_TEXT, Case, named_cases
from sparsevlm.bench.floor import Ceilings, floors
from sparsevlm.bench.providers import make_providers, shared_copy
from sparsevlm.bench.run import COLUMNS, Settings, run
from sparsevlm.bench.timing import PhaseTimer
from sparsevlm.bench.workload import fresh_inputs
from sparsevlm.models import view_of
from toys import tiny_model

ORIGIN = {"commit": "abc", "model": "tiny", "command": "sparsevlm bench"}
SMALL = Case(100, 2, 4)


def test_cases():
    assert len(CORE) == 12
    assert len({case.name for case in FULL}) == len(FULL)
    assert all(case.side**2 == case.n_visual for case in FULL)
    assert named_cases(("v256-b1-n64",), full=False) == (Case(256, 1, 64),)
    with pytest.raises(ValueError, match="there is no case v7"):
        named_cases(("v7",), full=True)


def test_inputs_are_fresh_and_what_the_model_takes():
    model = tiny_model(n_layers=12)
    generator = torch.Generator().manual_seed(0)
    first, second = (fresh_inputs(model, SMALL, generator) for _ in range(2))
    assert first["input_ids"].shape == (2, 100 + N_TEXT)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    state = apply_sparsevlm(model, keep=0.5)
    model.generate(**first, max_new_tokens=1)
    assert [sample.n_visual for sample in state.report.samples] == [100, 100]
    assert [sample.n_text for sample in state.report.samples] == [N_TEXT, N_TEXT]


def test_rows():
    model = tiny_model(n_layers=12)
    seen = []
    rows = run(model, [SMALL], Settings((0.5,), 3, 1), ORIGIN, lambda case, rows: seen.append((case, len(rows))))
    assert seen == [(SMALL, len(rows))]
    assert all(tuple(row) == COLUMNS for row in rows)
    assert {row["provider"] for row in rows} == {"hf-dense", "ours-dense", "ours", "random"}
    by = {(row["provider"], row["phase"], row["metric"]): row for row in rows}
    for provider in ("hf-dense", "ours-dense", "ours", "random"):
        total, first = by[provider, "total", "ms"], by[provider, "first_token", "ms"]
        assert float(total["p20"]) <= float(total["p50"]) <= float(total["p80"])
        assert 0 < float(first["p50"]) < float(total["p50"])
        parts = sum(float(by[provider, phase, "ms"]["p50"]) for phase in ("vision", "prefill"))
        assert parts < float(total["p50"])
        assert total["path"] == ("dense" if provider == "hf-dense" else "engine")
        assert total["note"] == ""
    assert float(by["ours", "prefill", "ms"]["floor"]) <= float(by["ours-dense", "prefill", "ms"]["floor"])
    assert not any("forward" in vars(module) for module in (model.model.language_model, model.model.visual))


def test_a_path_that_is_not_the_engines_is_void():
    model = tiny_model(n_layers=12)
    model.model.language_model.layers[3].mlp.register_forward_hook(lambda *_: None)
    rows = run(model, [SMALL], Settings((0.5,), 1, 1), ORIGIN)
    void = [row for row in rows if row["provider"] != "hf-dense"]
    assert void
    assert all(row["note"].startswith("void: ") and row["p50"] == "" for row in void)


def test_wrong_answers_are_not_timed(monkeypatch):
    model = tiny_model(n_layers=12)
    providers = make_providers(model, (0.5,), static=False)
    inputs = fresh_inputs(model, SMALL, torch.Generator().manual_seed(0))
    gate.check(providers, inputs)
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(64, 96, bias=False)
    with pytest.raises(RuntimeError, match="nothing was timed"):
        gate.check(providers, inputs)


def test_want_of_memory_is_a_row(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gate, "check", fail)
    rows = run(tiny_model(n_layers=12), [SMALL, SMALL], Settings((0.5,), 1, 1), ORIGIN)
    assert len(rows) == 8
    assert all(row["note"].startswith("out of memory") and row["p50"] == "" for row in rows)


def test_a_shared_copy_has_the_weights_of_its_model():
    model = tiny_model()
    twin = shared_copy(model)
    assert twin.lm_head is not model.lm_head
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))


def test_phases_add_up():
    model = tiny_model()
    inputs = fresh_inputs(model, Case(36, 1, 3), torch.Generator().manual_seed(0))
    with PhaseTimer(model) as timer:
        found = timer.measure(lambda: model.generate(**inputs, max_new_tokens=3, min_new_tokens=3), 3)
    assert found["total"] == pytest.approx(found["first_token"] + 2 * found["decode_per_token"])
    assert found["first_token"] == pytest.approx(found["vision"] + found["prefill"] + found["overhead"])
    assert not any(module._forward_hooks for module in (model, model.model.visual, model.model.language_model))


def test_floors_of_the_7b_shape():
    """As worked out once by hand: 5.5 TFLOP for the tower and 14.1 GB for a token at 1024 visual tokens."""
    with torch.device("meta"):
        model = shapes.empty_model("7b", torch.bfloat16, "sdpa")
    least = floors(view_of(model), Case(1024, 1, 2), [1024.0] * 28, Ceilings(773e12, 4.15e12))
    assert least["vision"] == pytest.approx(7.3, rel=0.06)
    assert least["prefill"] == pytest.approx(18.3, rel=0.05)
    assert least["decode_per_token"] == pytest.approx(3.4, rel=0.02)
    pruned = floors(view_of(model), Case(1024, 1, 2), [1024.0] * 3 + [164.0] * 25, Ceilings(773e12, 4.15e12))
    assert pruned["vision"] + pruned["prefill"] == pytest.approx(12.6, rel=0.05)


def test_random_weights_work(monkeypatch):
    small = {**shapes._TEXT["3b"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    monkeypatch.setitem(shapes._TEXT, "tiny", {**small, "num_attention_heads": 4, "num_key_value_heads": 2})
    monkeypatch.setitem(shapes._VISION, "hidden_size", 32)
    monkeypatch.setitem(shapes._VISION, "num_heads", 2)
    monkeypatch.setitem(shapes._ROPE, "mrope_section", [2, 3, 3])
    model = shapes.random_model("tiny", "cpu", torch.float32, "sdpa")
    inputs = fresh_inputs(model, Case(36, 1, 3), torch.Generator().manual_seed(0))
    logits = model(**inputs).logits
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0
    with pytest.raises(ValueError, match="there is no shape '13b'"):
        shapes.random_model("13b", "cpu", torch.float32, "sdpa")
