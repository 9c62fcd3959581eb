"""The table of goals says what was met, what was missed and what no row says."""

from __future__ import annotations

import pytest


@pytest.fixture
def goals():
    from benchmark import goals

    return goals


def row(provider, p50, case="v256-b1-n1", keep="1.0", **changes):
    made = {"case": case, "provider": provider, "keep": keep, "phase": "first_token", "metric": "ms", "floor": "10"}
    made["selector"] = provider.removeprefix("ours-") if provider.startswith("ours-") else "span"
    return made | {"p50": p50, "timestamp": "2", "gpu": "G", "commit": "abc"} | changes


def cells(table, call, measure):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {call} | {measure}")]
    return line.split(" | ")[-1].removesuffix(" |")


def test_what_is_missed_is_bold(goals):
    rows = [row("hf-dense", "60"), row("ours-default", "10", keep="adaptive"), row("ours", "15", keep="0.25")]
    table = goals.goals_table(rows, [])
    assert cells(table, "default", "times faster than hf-dense, first token") == "6.00, –, –, –"
    assert cells(table, "keep=0.25", "times faster than hf-dense, first token") == "**4.00**, –, –, –"
    assert cells(table, "keep=0.25", "first token by its bound") == "1.50, –, –"
    assert table.endswith("G, commit abc.\n")


def test_the_slowest_selector_of_each_placement_counts(goals):
    rows = [row("ours-dense", "30"), row("ours", "10", keep="0.25"), row("ours-default", "90", keep="adaptive")]
    rows += [row("ours-fastv", "40", keep="0.25"), row("ours-tome", "20", keep="0.25")]
    rows += [row("ours-divprune", "15", keep="0.25"), row("ours-vision", "99", keep="0.25")]
    table = goals.goals_table(rows, [])
    assert cells(table, "slowest selector inside the decoder, keep=0.25", "times") == "**0.75** (fastv), –, –"
    assert cells(table, "slowest selector before the decoder, keep=0.25", "times") == "1.50 (tome), –, –"
    rows += [row("ours", "60", keep="0.25", selector="span-features")]
    table = goals.goals_table(rows, [])
    before = cells(table, "slowest selector before the decoder, keep=0.25", "times")
    assert before == "**0.50** (span-features), –, –", "ours is of the selector that its rows name"


def test_mixed_shapes_count_on_the_requests_that_both_have_answered(goals):
    of = {"case": "mixed200", "phase": "total"}
    rows = [row("hf-dense", "900", metric="mean_ms", **of), row("vllm-dense", "150", metric="mean_ms", **of)]
    rows += [row("ours", "100", keep="0.25", metric=metric, **of) for metric in ("ms", "mean_ms")]
    rows += [row("ours", "7", keep="0.25", metric="x", **of)]
    rows += [row("ours", "2.5", keep="0.25", metric="worst_by_median", **of)]
    table = goals.goals_table(rows, [])
    assert cells(table, "keep=0.25", "times faster than hf-dense, whole generate") == "–, 7.00"
    assert cells(table, "keep=0.25", "times faster than vllm-dense, whole generate") == "–, –, 1.50"
    assert cells(table, "keep=0.25", "worst call") == "**2.50**"


def test_the_time_until_ready_is_that_of_the_newest_commit(goals):
    shared = {"operation": "apply and warm-up", "metric": "ms", "gpu": "G", "provider": "ours", "timestamp": "2"}
    ready = [
        {**shared, "commit": "new", "timing": goals.FILLED, "p50": "13500"},
        {**shared, "commit": "new", "timing": goals.FILLED, "p50": "2e9", "metric": "bytes"},
        {**shared, "commit": "old", "timing": goals.EMPTY, "p50": "9000", "timestamp": "1"},
    ]
    table = goals.goals_table([], ready)
    assert cells(table, "keep=0.25", "seconds until ready") == "**13.5**, –"
    assert cells(table, "default", "seconds until ready") == "–, –"


def test_memory_is_that_of_hf_dense_at_most(goals):
    of = {"case": "v16384-b1-n1", "phase": "total", "metric": "bytes"}
    rows = [row("hf-dense", "2e10", **of), row("ours", "3e10", keep="0.25", **of)]
    table = goals.goals_table([*rows, row("ours-default", "1e10", keep="adaptive", **of)], [])
    assert cells(table, "keep=0.25", "peak of memory by that of hf-dense") == "**1.50**"
    assert cells(table, "default", "peak of memory by that of hf-dense") == "0.50"
    of = {"case": "v1024-b1-n64", "phase": "decode_per_token", "keep": "0.25"}
    table = goals.goals_table([row("ours-fp8", "6", **of), row("ours", "12", **of)], [])
    assert cells(table, 'keep=0.25, weights="fp8"', "each further token") == "0.60"
    assert cells(table, "keep=0.25", "each further token by its bound") == "**1.20**"
