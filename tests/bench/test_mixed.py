"""Requests of mixed shapes, on a tiny model."""

from __future__ import annotations

import statistics

import pytest
import torch

from sparsevlm.bench import agreement, mixed
from sparsevlm.bench.cases import Case, MixedCase
from sparsevlm.bench.mixed import MixedMeasurement, measure_mixed, mixed_rows, worst_by_median
from sparsevlm.bench.providers import make_providers
from sparsevlm.bench.roofline import Roofline
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.rows import COLUMNS
from sparsevlm.bench.steps import Expected
from sparsevlm.models import adapter_for
from sparsevlm.state import SparseVLMState
from sparsevlm.warmup import WarmupReport
from toys import tiny_model

SMALL = MixedCase(6, new_tokens=2, visual=(36, 100), text=(20, 40))
SETTINGS = Settings((0.5,), iterations=1, warmup=1, vision_keep=1.0, selectors=())
PEAKS = Roofline(1e12, 1e12)


@pytest.fixture(scope="module")
def measured():
    """Rows of a run, and the requests that each provider was given, the warm-up's first."""
    model = tiny_model(n_layers=6)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        draw = mixed.fresh_inputs
        patch.setattr(mixed, "fresh_inputs", lambda model, case, *more: seen.append(case) or draw(model, case, *more))
        providers = make_providers(model, (0.5,), static=False, selectors=("random", "sparsevlm"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            measurements = measure_mixed(SMALL, providers, SETTINGS, generator)
    rows = mixed_rows(SMALL, measurements, SETTINGS, adapter_for(model), PEAKS, {"timestamp": "now"})
    return measurements, rows, seen


def by_metric(rows, provider):
    return {(row["phase"], row["metric"]): row for row in rows if row["provider"] == provider}


def test_rows(measured):
    measurements, rows, _ = measured
    assert [provider.name for provider in measurements] == [
        *("hf-dense", "ours-default", "ours-dense", "ours", "ours-engine", "ours-sparsevlm")
    ]
    assert all(tuple(row) == COLUMNS and row["case"] == "mixed6" and row["batch"] == "1" for row in rows)
    for provider, one in measurements.items():
        found = by_metric(rows, provider.name)
        totals = [times["total"] for times in one.by_request.values()]
        assert len(totals) == 6
        assert float(found["total", "mean_ms"]["p50"]) == pytest.approx(statistics.fmean(totals), rel=1e-4)
        assert float(found["total", "ms"]["p50"]) == pytest.approx(statistics.median(totals), rel=1e-4)
        assert float(found["first_token", "mean_ms"]["p50"]) < float(found["total", "mean_ms"]["p50"])
        assert float(found["total", "mean_ms"]["floor"]) > 0
        assert float(found["total", "worst_by_median"]["p50"]) >= 1
        assert "like sizes: eighths of an octave" in found["total", "worst_by_median"]["note"]
        assert float(found["warmup", "seconds"]["p50"]) > 0
        assert found["total", "ms"]["path"] == {"hf-dense": "dense", "ours-engine": "engine"}.get(
            provider.name, "plain"
        )
    dense, ours = (
        measurements[provider].by_request for provider in measurements if provider.name in ("hf-dense", "ours")
    )
    ratio = sum(one["total"] for one in dense.values()) / sum(one["total"] for one in ours.values())
    assert float(by_metric(rows, "ours")["total", "x"]["p50"]) == pytest.approx(ratio, rel=1e-4)
    assert float(by_metric(rows, "hf-dense")["total", "x"]["p50"]) == 1


def test_no_provider_is_warmed_up_by_what_is_measured(measured):
    _, _, seen = measured
    requests, warmup = SMALL.requests(0), SMALL.warmup_requests(0)
    assert not set(requests) & set(warmup)
    seen = seen[1:]  # by which answers were compared
    for _ in range(5):  # this library's, whose warm-up draws none
        own, seen = seen[:6], seen[6:]
        assert own == list(requests)
    assert set(seen[-6:]) == set(requests)
    assert seen[:-6]
    assert set(seen[:-6]) < set(warmup)


def test_this_library_runs_its_ladder(monkeypatch):
    """Under the options that are measured, before the first request."""
    seen = []

    def warmup(state, *requests, **options):
        config = state._session.options.config
        seen.append((requests, options, config.keep, config.selector, config.engine))
        return WarmupReport(n_run=5, n_left=2, seconds=0.1, n_bytes=0)

    monkeypatch.setattr(SparseVLMState, "warmup", warmup)
    model = tiny_model(n_layers=6)
    providers = make_providers(model, (0.5,), static=False, selectors=("sparsevlm",))
    steps = []
    with torch.no_grad():
        measurements = measure_mixed(SMALL, providers, SETTINGS, torch.Generator().manual_seed(0), steps.append)
    assert steps[0].stage == "comparing answers"
    begun = [(step.provider, step.number, step.of) for step in steps if step.begins]
    assert begun == [
        *(("ours-default", 1, 6), ("ours", 2, 6), ("ours-engine", 3, 6), ("ours-sparsevlm", 4, 6)),
        *(("ours-dense", 5, 6), ("hf-dense", 6, 6)),
    ]
    assert [step.stage for step in steps if step.provider == "hf-dense"] == [
        *("warm-up", *(f"request {n} of 6" for n in range(1, 7)))
    ]
    assert seen == [
        ((), {"max_new_tokens": 2}, None, None, None),
        ((), {"max_new_tokens": 2}, 0.5, None, None),
        ((), {"max_new_tokens": 2}, 0.5, None, True),
        ((), {"max_new_tokens": 2}, 0.5, "sparsevlm", None),
        ((), {"max_new_tokens": 2}, 1.0, None, None),
    ]
    rows = mixed_rows(SMALL, measurements, SETTINGS, adapter_for(model), PEAKS, {})
    notes = {row["provider"]: row["note"] for row in rows if row["phase"] == "warmup"}
    assert notes.pop("hf-dense") == ""
    assert set(notes.values()) == {"5 of 7 requests of the ladder"}


def test_transformers_answers_as_many_as_there_is_time_for(monkeypatch):
    monkeypatch.setattr(mixed, "DENSE_SECONDS", 0.0)
    monkeypatch.setattr(mixed, "_LEAST_REQUESTS", 2)
    model = tiny_model(n_layers=6)
    providers = [one for one in make_providers(model, (), static=False) if one.name in ("hf-dense", "ours-dense")]
    with torch.no_grad():
        measurements = measure_mixed(SMALL, providers, SETTINGS, torch.Generator().manual_seed(0))
    rows = mixed_rows(SMALL, measurements, SETTINGS, adapter_for(model), PEAKS, {})
    theirs, ours = by_metric(rows, "hf-dense"), by_metric(rows, "ours-dense")
    assert theirs["total", "mean_ms"]["note"] == "2 of 6 requests, drawn by the seed"
    assert ours["total", "mean_ms"]["note"] == ""
    dense, own = (measurements[provider].by_request for provider in providers)
    assert (len(dense), len(own)) == (2, 6)
    ratio = sum(one["total"] for one in dense.values()) / sum(own[i]["total"] for i in dense)
    assert float(ours["total", "x"]["p50"]) == pytest.approx(ratio, rel=1e-4)


def test_a_case_that_is_not_right_is_a_row(monkeypatch):
    def fail(*_):
        raise agreement.DisagreementError("they differ.")

    monkeypatch.setattr(agreement, "check", fail)
    model = tiny_model(n_layers=6)
    providers = make_providers(model, (), static=False)
    measurements = measure_mixed(SMALL, providers, SETTINGS, torch.Generator().manual_seed(0))
    rows = mixed_rows(SMALL, measurements, SETTINGS, adapter_for(model), PEAKS, {})
    assert {row["note"] for row in rows} == {"not timed: they differ."}
    assert len(rows) == 3


def test_a_request_off_the_engine_makes_the_run_void():
    model = tiny_model(n_layers=6)
    model.model.language_model.layers[3].mlp.register_forward_hook(lambda *_: None)
    providers = make_providers(model, (0.5,), static=False)
    with torch.no_grad():
        measurements = measure_mixed(SMALL, providers, SETTINGS, torch.Generator().manual_seed(0))
    rows = mixed_rows(SMALL, measurements, SETTINGS, adapter_for(model), PEAKS, {})
    (void,) = [row for row in rows if row["provider"] == "ours-engine"]
    assert void["note"].startswith("void: ")
    assert not void["p50"]
    assert all(row["p50"] for row in rows if row is not void)


def test_time_that_is_left_is_known_up_to_the_last_request(monkeypatch):
    """By what is expected of providers to come, and by the requests of one that has begun."""
    model, steps, clock = tiny_model(n_layers=6), [], [0.0]
    providers = [one for one in make_providers(model, (), static=False) if one.name in ("hf-dense", "ours-dense")]
    expected = {one: Expected(ahead=4.0, call=10.0) for one in providers}

    def answer(provider, inputs, new_tokens, measured):
        clock[0] += 3.0
        return {"total": 1.0}, 1.0

    monkeypatch.setattr(mixed, "time_provider", answer)
    monkeypatch.setattr(mixed.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(mixed, "DENSE_SECONDS", 30.0)
    measure_mixed(SMALL, providers, SETTINGS, torch.Generator().manual_seed(0), steps.append, expected)
    ours, theirs = (
        [step.seconds_left for step in steps if step.provider == name] for name in ("ours-dense", "hf-dense")
    )
    assert steps[0].seconds_left == (4 + 60) + (4 + 30), "transformers is given no more than its time"
    assert ours == [64 + 34, 60 + 34, 15 + 34, 12 + 34, 9 + 34, 6 + 34, 3 + 34]
    assert theirs == [34, 30, 15, 12, 9, 6, 3]


def test_the_worst_call_by_the_median_of_its_class():
    requests = [Case(n, 1, 1, n_text=10) for n in (100, 101, 102, 400, 401, 402)]
    worst, note = worst_by_median(requests, dict(enumerate([10.0, 12.0, 30.0, 100.0, 90.0, 150.0])))
    assert worst == 2.5
    assert note.startswith("worst: 30 ms, median of 3 calls of 110 to 112 tokens;")
    assert worst_by_median(requests, {3: 5.0})[0] == 1.0


def test_what_another_process_has_measured_has_no_warmup():
    measured = MixedMeasurement(path="vllm", by_request={0: {"total": 2.0}, 1: {"total": 4.0}})
    model = tiny_model(n_layers=6)
    provider = make_providers(model, (), static=False)[0]
    rows = mixed_rows(SMALL, {provider: measured}, SETTINGS, adapter_for(model), PEAKS, {})
    assert [(row["phase"], row["metric"]) for row in rows] == [
        ("total", "ms"), ("total", "mean_ms"), ("total", "x"), ("total", "worst_by_median")
    ]  # fmt: skip
    assert rows[1]["p50"] == "3"
