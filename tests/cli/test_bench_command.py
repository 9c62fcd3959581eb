"""``sparsevlm bench`` on a tiny checkpoint."""

from __future__ import annotations

import csv

import pytest
from typer.testing import CliRunner

from sparsevlm.bench.rows import COLUMNS
from sparsevlm.cli import app
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
    assert all(name in words for name in ("hf-dense", "ours-dense", "ours", "random"))
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert len({row["timestamp"] for row in found}) <= 2
    assert {row["model"] for row in found} == {"tiny"}
    assert all(row["command"].startswith("sparsevlm") for row in found)
    rows.write_text("a,b\n1,2\n")
    result = call("--model", checkpoint, "--cases", "v256-b1-n1", "--append-to", str(rows), *FAST)
    assert "has other columns (a, b)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "v9"], "there is no case v9; there are v256-b1-n1"),
        (["--keep", "1.5"], "must be fractions between 0 and 1"),
        (["--keep", "half"], "must be fractions with commas"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--keep", "0.5,0.4,0.3,0.2", "--model", "tiny", "--device", "cpu"], "at most 3 budgets"),
        (["--append-to", "rows.txt"], "must end in .csv"),
    ],
)
def test_mistakes(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
