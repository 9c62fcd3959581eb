"""Figures whose calls disagree are named."""

from __future__ import annotations

from sparsevlm.bench.rows import spread
from sparsevlm.bench.scatter import LIMIT, scatter, scattered
from sparsevlm.cli.bench_output import scatter_note


def row(values, provider="ours", phase="total", metric="ms", keep="0.25"):
    return {"provider": provider, "keep": keep, "phase": phase, "metric": metric, **spread(values)}


def test_one_slow_call_of_ten_is_no_scatter():
    assert scatter(row([10.0] * 9 + [100.0])) == 0.0
    assert scatter(row([10.0] * 6 + [30.0] * 4)) > LIMIT
    assert scatter(row([10.0, 10.0, 30.0])) > LIMIT
    assert scatter({**row([1.0]), "p50": ""}) == 0.0


def test_only_times_are_looked_at():
    apart = [10.0, 10.0, 20.0, 20.0]
    rows = [row(apart), row(apart, phase="vision"), row(apart, metric="tokens_per_s"), row([10.0, 11.0], "hf-dense")]
    assert {setting: sorted(phases) for setting, phases in scattered(rows).items()} == {
        ("ours", "0.25"): ["total", "vision"]
    }


def test_the_note_names_figures_and_the_factors_made_of_them():
    apart = [10.0, 10.0, 20.0, 20.0]
    assert scatter_note([row([10.0, 10.5, 11.0])]) == ""
    assert scatter_note([row(apart, phase="overhead")]) == "", "no table shows it"
    note = scatter_note([row(apart, phase="decode_per_token"), row(apart, phase="first_token")])
    assert note.endswith("nor their x: ours 0.25 (first token, /token; up to 67%).")
    note = scatter_note([row(apart, "hf-dense", keep="1.0"), row(apart)])
    assert "nor every x, as hf-dense is among them: hf-dense 1.0 (total; up to 67%); ours 0.25 (total" in note
