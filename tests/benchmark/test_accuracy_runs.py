"""The runs of the accuracy tables: a command a suite, side by side."""

from __future__ import annotations

import csv
import json
import os
from types import SimpleNamespace

import pytest
from benchmark.accuracy_runs import SUITES, Asked, ablation, run_all
from transformers import LlamaConfig

from benchmark import accuracy_runs
from sparsevlm.bundled import bundled_path
from sparsevlm.cli import main
from sparsevlm.cli.options import parse_keep, parse_layers
from sparsevlm.evaluation.execution.feasible import feasible_settings
from sparsevlm.evaluation.settings import EvalConfig
from sparsevlm.smol.model import bundled_tower, make_config

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


@pytest.mark.parametrize("model", SUITES)
def test_the_ablation_asks_for_what_a_model_can_run(tmp_path, model):
    """At the layers of the published share of its depth."""
    folder = bundled_path() if model == "bundled" else smol_skeleton(tmp_path)
    for one in ablation(Asked()):
        command = one.command(model, "demo", tmp_path)
        layers = parse_layers(command[-1]) if one.layers else None
        options = dict(text.partition("=")[::2] for text in one.options[1:])
        options = {name: text if name in ("schedule", "raters") else json.loads(text) for name, text in options.items()}
        names, keeps = tuple(one.selectors.split(",")), tuple(map(parse_keep, one.keep.split(",")))
        config = EvalConfig("demo", model, selectors=names, keeps=keeps, target_layers=layers, options=options)
        settings, refused = feasible_settings(config, folder)
        assert len(settings) == 1 + len(names) * len(keeps)
        assert not refused
        if one.selectors == "v2drop":
            assert layers == ((2, 12, 16) if model == "bundled" else (2, 15, 20))


def smol_skeleton(folder):
    """A folder with its configuration alone: what it can run is told without weights."""
    decoder = LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3)
    make_config(decoder, bundled_tower()).save_pretrained(folder)
    return folder


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
