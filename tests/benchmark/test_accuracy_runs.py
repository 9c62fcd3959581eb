"""The runs of the accuracy tables: a command a suite, side by side."""

from __future__ import annotations

import csv
import json
import os
from types import SimpleNamespace

import pytest
from benchmark.accuracy_runs import LATE_LAYER, SUITES, Asked, ablation, run_all

from benchmark import accuracy_runs
from sparsevlm.bundled import bundled_path
from sparsevlm.cli import main
from sparsevlm.cli.options import parse_keep, parse_layers
from sparsevlm.evaluation.execution.feasible import feasible_settings
from sparsevlm.evaluation.settings import EvalConfig

SCRIPT = """#!/bin/sh
case "$*" in *grounds*) echo "no ground" >&2; exit 3;; esac
echo "on ${CUDA_VISIBLE_DEVICES:-the CPU}: $*"
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A stand-in of the command, which says what it was given."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sparsevlm").write_text(SCRIPT)
    (tmp_path / "bin" / "sparsevlm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.mark.parametrize("n_gpus", [0, 2])
def test_every_suite_has_a_command_and_a_place(recorded, n_gpus, capsys, monkeypatch):
    """Without the suites themselves, some of which need photographs."""
    n_tasks = {"demo": 10, "documents": 5}

    def opened(config):
        return SimpleNamespace(tasks=range(n_tasks.get(config.suite, 4)))

    monkeypatch.setattr(accuracy_runs, "open_suite", opened)
    asked = [Asked("random", "0.25", 90, 13, 2)]
    failed = run_all(asked, ["bundled", "smol"], n_gpus, recorded / "a.csv", recorded / "l", 3)
    assert failed == 2
    said = {path.stem[3:]: path.read_text() for path in (recorded / "l").iterdir()}
    assert set(said) == {f"{suite}-{model}" for model, suites in SUITES.items() for suite in suites}
    place = "on 0: " if n_gpus else "on the CPU: "
    assert said["demo-bundled"] == (
        f"{place}eval --yes --model bundled --suite demo --selectors random --keep 0.25 --limit 9 --batch 13 "
        f"--workers 2 --append-to {os.path.relpath(recorded / 'a.csv')}\n"
    )
    assert "--model smol --suite documents " in said["documents-smol"]
    assert "--limit 18 " in said["documents-smol"], "five tasks"
    assert "no ground" in capsys.readouterr().out


def test_the_ablation_asks_for_settings_that_the_command_line_knows(tmp_path):
    """Of both models, to what is feasible; the layer is the model's own."""
    lists = {model: [one.command(model, "demo", tmp_path) for one in ablation(Asked(n=10))] for model in SUITES}
    assert [command[-2:] for command in lists["smol"]][-1] == ["--target-layers", "20"]
    assert [command[-2:] for command in lists["bundled"]][-1] == ["--target-layers", "14"]
    for one in ablation(Asked()):
        names, (flag, value) = tuple(one.selectors.split(",")), one.options
        name, _, text = value.partition("=")
        options = {name: text if name in ("schedule", "raters") else json.loads(text)} if flag == "--set" else {}
        layers = parse_layers(LATE_LAYER["bundled"]) if flag == "--target-layers" else None
        keeps = (parse_keep(one.keep),)
        config = EvalConfig("demo", "bundled", selectors=names, keeps=keeps, target_layers=layers, options=options)
        settings, refused = feasible_settings(config, bundled_path())
        assert len(settings) == 1 + len(names)
        assert not refused


def test_the_commands_are_the_command_lines(tmp_path, monkeypatch):
    """One of them through the command line itself, on few questions."""
    target = tmp_path / "rows.csv"
    monkeypatch.chdir(tmp_path)
    command = Asked("grid", "0.5", 10, 10, 1).command("bundled", "demo", target)
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = list(csv.DictReader(target.open()))
    assert {row["selector"] for row in rows} == {"dense", "grid"}
    assert {row["n"] for row in rows} == {"1", "10"}
