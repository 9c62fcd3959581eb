"""Cases and rows of the benchmark of vLLM's plugin, without vLLM."""

from __future__ import annotations

from benchmark import bench_vllm_pruning as bench
from benchmark import vllm_setup


def parsed(*arguments):
    return bench._parse(["--shape", "tiny", "--keep", "0.5,0.25", "--selectors", "divprune,mmtok", *arguments])


def test_dense_and_pruned_engines_get_the_same_requests():
    given = parsed("--visual", "1024,4096", "--requests", "1,8")
    dense, pruned = (
        list(bench._cases(given, [None])),
        list(bench._cases(given, vllm_setup.pruning_settings(given.keep, given.selectors))),
    )
    assert [one["name"] for one in dense] == [
        "first token, 1024 visual", "first token, 4096 visual", "1 together", "8 together"
    ]  # fmt: skip
    assert len(pruned) == 5 * len(dense)
    assert {one["n_kept"] for one in dense} == {1024, 4096}
    assert [one["n_kept"] for one in pruned if one["options"] == {"keep": 0.25, "selector": "mmtok"}] == [
        256, 1024, 256, 256
    ]  # fmt: skip


def test_rows_tell_throughput_and_percentiles():
    (case,) = [
        one for one in bench._cases(parsed("--visual", "64", "--requests", "8"), [{"keep": 0.5, "selector": "mmtok"}])
        if one["requests"] == 8
    ]  # fmt: skip
    found = {"times": {"total": [1000.0, 2000.0], "first_token": [float(i) for i in range(1, 101)]}, "note": ""}
    rows = {(row["phase"], row["metric"]): row for row in bench._rows(parsed(), case, found)}
    assert set(next(iter(rows.values()))) <= set(bench.COLUMNS)
    assert rows["total", "new_tokens_per_s"]["p50"] == f"{(8 * 64 + 8 * 32) / 2:.6g}"
    assert float(rows["first_token", "ms"]["p99"]) > 99
    assert rows["first_token", "ms"]["n"] == "100"
    assert {row["n_kept"] for row in rows.values()} == {"32"}


def test_a_case_that_failed_has_a_row_with_the_reason():
    (case, *_) = bench._cases(parsed("--visual", "64", "--requests", "1"), [None])
    (row,) = bench._rows(parsed(), case, {"times": {}, "note": "failed: no memory"})
    assert row["note"] == "failed: no memory"
    assert row["provider"] == vllm_setup.DENSE
