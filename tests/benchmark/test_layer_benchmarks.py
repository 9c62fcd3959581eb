"""The scripts of ``benchmark/`` run, and their rows say what was measured: small shapes on a CPU."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Runs a script of ``benchmark/`` and gives its rows."""
    monkeypatch.setattr("benchmark.timed._SECONDS", 0.01)

    def run(name):
        file = tmp_path / f"{name}.csv"
        arguments = ["--device", "cpu", "--small", "--append-to", str(file)]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(f"benchmark.{name}").main()
        with file.open(encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        for row in rows:
            assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
            assert row["command"].startswith(f"python -m benchmark.{name} --device cpu --small")
            assert all(row[column] for column in ("commit", "gpu", "torch", "transformers", "timestamp", "shape"))
        return rows

    return run


def test_kernels(script, capsys):
    rows = script("bench_layer1")
    operations = {row["operation"] for row in rows}
    assert operations == {
        *("rms_norm with residual", "swiglu", "rotate", "varlen_attention, prompts", "varlen_attention, windows"),
        *("decode_attention", "rater attention", "products", "pivots", "rank", "decoder layer"),
        *("received attention", "farthest points", "coverage"),
    }
    for operation in operations - {"decoder layer"}:
        assert len({row["provider"] for row in rows if row["operation"] == operation}) == 2, operation
    assert all(float(row["floor"]) > 0 for row in rows if row["operation"] != "rank")
    assert all(row["note"].startswith("0 of") for row in rows if row["provider"] == "svdvals")
    printed = capsys.readouterr().out
    assert [f"| {n} | " in printed for n in (256, 128, 96, 64)] == [True] * 4


def test_ranks_that_differ_are_an_error(script, monkeypatch):
    from benchmark import bench_layer1

    monkeypatch.setattr(bench_layer1, "sketch_rank", lambda matrices, _: torch.ones(len(matrices), dtype=torch.int64))
    with pytest.raises(RuntimeError, match="are not those of the singular values"):
        script("bench_layer1")


def test_ranks_by_singular_values():
    from benchmark.bench_layer1 import check_ranks, singular_ranks

    matrices = torch.stack([torch.diag(torch.tensor(values)) for values in ([3.0, 0.9, 0.0], [1.0, 1.0, 1.0])])
    assert singular_ranks(matrices, 0.1).tolist() == [1, 3]
    check_ranks(matrices, torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match="1 of 2 ranks"):
        check_ranks(matrices, torch.tensor([1, 2]))


def test_packing(script):
    rows = script("bench_layer2")
    assert {row["provider"] for row in rows} == {"transformers", "ours", "transformers, padded", "ours, packed"}
    waste = {row["shape"].split(",")[0]: row["note"] for row in rows if row["provider"] == "transformers, padded"}
    assert waste["equal"].startswith("0 %")
    assert waste["one long"].startswith("57 %")


def test_packed_rows_that_differ_are_not_timed(script, monkeypatch):
    from benchmark import bench_layer2

    monkeypatch.setattr(bench_layer2, "rotate", lambda query, key, cos, sin: (query, key))
    with pytest.raises(RuntimeError, match="nothing was timed"):
        script("bench_layer2")


def test_graphs(script):
    rows = script("bench_layer3")
    for operation in ("prompt", "decode step"):
        for provider in ("one by one", "graph"):
            found = [row for row in rows if row["operation"] == operation and row["provider"] == provider]
            assert len(found) == 4
            assert all(float(row["floor"]) > 0 for row in found)
            first = [row for row in rows if row["operation"] == f"{operation}, first" and row["provider"] == provider]
            assert {row["metric"] for row in first} == {"ms", "bytes"}
    notes = {row["note"] for row in rows if row["operation"] == "prompt"}
    assert notes
    assert all(note.endswith("of the rows fill up") for note in notes)


def test_whole_calls_go_to_their_file(monkeypatch):
    from benchmark import bench_e2e

    seen = []
    monkeypatch.setattr(bench_e2e, "sparsevlm", lambda: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["bench_e2e"])
    bench_e2e.main(["--full"])
    bench_e2e.main(["--append-to", "mine.csv"])
    assert seen == [
        ["sparsevlm", "bench", "--full", "--append-to", os.path.relpath(bench_e2e.E2E)],
        ["sparsevlm", "bench", "--append-to", "mine.csv"],
    ]


def test_accuracy_beside_retained_tokens():
    from benchmark.retained import accuracy

    row = {"suite": "demo", "task": "average", "selector": "span-features", "target_layers": "default", "options": ""}
    row |= {"keep": "0.5", "retained": "97.26", "n": "100", "timestamp": "1", "model": "bundled", "run": "a"}
    rows = [row, row | {"n": "900", "retained": "99.61", "run": "b"}, row | {"keep": "adaptive", "n": "2000"}]
    rows += [row | {"n": "9000", **other} for other in ({"model": "smol"}, {"selector": "span"})]
    assert accuracy(rows, 256) == "100 (dense)"
    assert accuracy(rows, 128) == "99.6 (bundled, span-features, keep 0.5, n = 900, b)"
    assert accuracy(rows, 64) == "no stored row"


def test_ready(script, monkeypatch):
    """The first process is one; what the others do, this one does."""
    from benchmark import bench_ready

    start, folders = subprocess.run, []

    def run(command, **options):
        if "--child" not in command:  # such as git
            return start(command, **options)
        folders.append(options["env"]["TRITON_CACHE_DIR"])
        if len(folders) == 1:
            return start(command, **options)
        provider, device, small = command[-3:]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            bench_ready.child(provider, device, small == "1")
        return subprocess.CompletedProcess(command, 0, printed.getvalue())

    monkeypatch.setattr(bench_ready.subprocess, "run", run)
    rows = script("bench_ready")
    assert folders[0] == folders[1] != folders[2] == folders[3]
    assert [(row["provider"], row["timing"]) for row in rows[::7]] == [
        (provider, f"Triton's cache {cache}") for provider in ("ours-default", "ours") for cache in ("empty", "filled")
    ]
    assert len(rows) == 28
    for i in range(0, 28, 7):
        warmup, *requests = rows[i : i + 7]
        assert (warmup["operation"], warmup["shape"]) == ("apply and warm-up", "up to 4096 visual tokens")
        assert warmup["note"] == "0 of 0 requests of the ladder"  # on a CPU nothing is recorded
        assert [row["operation"] for row in requests] == [
            f"{which} request of a shape" for _ in range(3) for which in ("first", "second")
        ]
        assert len({row["shape"] for row in requests}) == 3
        assert {row["note"] for row in requests} == {"path plain" if i < 14 else "path engine"}
    assert all(float(row["p50"]) > 0 for row in rows)


def test_the_ladder_holds_none_of_the_requests_behind_it():
    """Neither their grids nor their numbers of tokens."""
    from benchmark import bench_ready
    from sparsevlm.bench.shapes import empty_model
    from sparsevlm.models import adapter_for
    from sparsevlm.warmup import ladder

    with torch.device("meta"):
        model = empty_model("7b", torch.bfloat16, "sdpa")
        ahead = [rung.make() for rung in ladder(adapter_for(model), 4096, True)]
    lengths, patches = {one["input_ids"].shape[1] for one in ahead}, {one["pixel_values"].shape[0] for one in ahead}
    assert len(lengths) > 25
    for case in bench_ready.CASES:
        height, width = case.grid
        assert case.n_visual == height * width < 4096
        assert case.n_visual + case.n_text not in lengths
        assert 4 * case.n_visual not in patches
