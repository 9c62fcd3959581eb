"""``sparsevlm bench`` on a tiny checkpoint."""

from __future__ import annotations

import csv

import pytest
from typer.testing import CliRunner

from sparsevlm.bench.cases import Case, MixedCase
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.rows import COLUMNS
from sparsevlm.cli import app
from sparsevlm.cli import bench as bench_command
from sparsevlm.cli.bench_tables import print_case
from tiny_checkpoint import save_tiny_checkpoint

FAST = ["--device", "cpu", "--dtype", "float32", "--iterations", "1", "--warmup", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", n_layers=12))


def call(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_table_and_rows(checkpoint, tmp_path):
    rows = tmp_path / "rows.csv"
    for _ in range(2):
        result = call("--model", checkpoint, "--cases", "v256-b1-n1", "--append-to", str(rows), *FAST)
        assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert "v256-b1-n1" in words
    assert all(name in words for name in ("hf-dense", "ours-default", "ours-dense", "ours-sparsevlm", "ours-random"))
    assert "ours-default: hooks on the model's own modules" in words
    progress = " ".join(result.stderr.split())
    assert "1 cases, 7 providers: about" in progress
    assert "v256-b1-n1 (1 of 1), about" in progress
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert len({row["timestamp"] for row in found}) <= 2
    assert {row["model"] for row in found} == {"tiny"}
    assert all(row["command"].startswith("sparsevlm") for row in found)
    rows.write_text("a,b\n1,2\n")
    result = call("--model", checkpoint, "--cases", "v256-b1-n1", "--append-to", str(rows), *FAST)
    assert "has other columns (a, b)" in result.stderr


def test_pictures_and_selectors(checkpoint, tmp_path):
    """A selector that reads the tower runs on the engine like all others."""
    rows = tmp_path / "rows.csv"
    arguments = ["--cases", "v256-b1-n1,picture448-b1-n1", "--selectors", "visionzip", "--append-to", str(rows)]
    result = call("--model", checkpoint, *arguments, *FAST)
    assert result.exit_code == 0, result.stderr
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    zipped = [row for row in found if row["provider"] == "ours-visionzip"]
    assert {row["phase"] for row in zipped} == {"first_token", "vision", "prefill", "overhead", "total"}
    assert {row["path"] for row in zipped} == {"engine"}
    assert all(row["p50"] and not row["note"] for row in zipped)
    pictures = [row for row in found if row["case"] == "picture448-b1-n1"]
    # The checkpoint takes no more than 96 visual tokens of an image.
    assert {int(row["n_visual"]) for row in pictures} == {81}
    assert "preprocess" in result.stdout


def test_tables(capsys):
    shared = {"keep": "1.0", "phase": "total", "metric": "ms", "note": "", "p50": "30", "floor": "10"}
    mixed = [{**shared, "provider": "hf-dense", "metric": "mean_ms", "p50": "60", "note": "8 of 24 requests"}]
    mixed += [{**shared, "provider": "ours", "keep": "0.25", "metric": "mean_ms", "p50": "20"}]
    mixed += [{**shared, "provider": "ours", "keep": "0.25", "metric": "x", "p50": "3.5"}]
    mixed += [{**shared, "provider": "ours", "keep": "0.25", "metric": "worst_by_median", "p50": "1.25"}]
    mixed += [{**shared, "provider": "vllm-dense", "p50": "", "note": "failed: it did"}]
    print_case(MixedCase(24), mixed)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["mixed24"]
    assert lines[1] == ["provider", "keep", "total", "x", "worst"]
    assert lines[3] == ["hf-dense", "1.0", "60.0"]
    assert lines[4] == ["ours", "0.25", "20.0", "3.50", "1.25"]
    assert lines[5] == ["vllm-dense", "1.0"]
    assert lines[6:] == [["hf-dense:", "8", "of", "24", "requests"], ["vllm-dense:", "failed:", "it", "did"]]
    print_case(Case(256, 1, 1), [{**shared, "provider": "hf-dense", "p50": "", "note": "out of memory"}])
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "is_measured"), [("tiny", True), ("llava-tiny", False)])
def test_vllm_is_measured_of_models_whose_processors_are_at_hand(model, is_measured, monkeypatch, capsys):
    from sparsevlm.bench import vllm_dense

    measured = []
    monkeypatch.setattr(vllm_dense, "vllm_is_installed", lambda: True)
    monkeypatch.setattr(vllm_dense, "measure_vllm", lambda *arguments, **options: measured.append(options) or {})
    place = bench_command._Place(model, None, "float32", "cuda", "sdpa")
    assert bench_command._measure_vllm(place, [Case(100, 1, 1)], Settings()) == {}
    assert bool(measured) == is_measured
    assert ("vllm-dense: left out; it is measured of qwen2_vl" in capsys.readouterr().err) != is_measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "llava-tiny", "--cases", "picture896-b1-n1,mixed24", *FAST],
            "none of these cases can be measured",
        ),
        (["--cases", "v9"], "there is no case v9; there are v256-b1-n1"),
        (["--keep", "1.5"], "must be fractions between 0 and 1"),
        (["--keep", "half"], "must be fractions with commas"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--selectors", "sparsevlm,spam"], "there is no selector 'spam'; there are all, cdpruner"),
        (["--append-to", "rows.txt"], "must end in .csv"),
    ],
)
def test_mistakes(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
