"""``python -m benchmark.reproduce``: offline, on the bundled model, over small files in the real tasks' schemas."""

import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stock_schemas import SEEDS, TASKS, write_tasks

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lmms_eval") is None,
        reason="lmms-eval is not installed: nox -s lmms_eval, or pip install '.[eval]' after torch",
    ),
    pytest.mark.timeout(1200),
]

ROOT = Path(__file__).parents[2]
SETTINGS = ("dense", "span_128", "downsample_128")
TABLE = ["--tasks", ",".join(TASKS), "--selectors", "span,downsample", "--keep", "128"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    desk = tmp_path_factory.mktemp("reproduce")
    write_tasks(desk / "tasks", desk)
    (desk / "site").mkdir()
    shutil.copy(ROOT / "tests" / "torchvision_shim.py", desk / "site" / "sitecustomize.py")
    return desk


def start(desk, out, *arguments):
    """The command, in a directory that is not the project's."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(desk / "site")]),
        "HF_HOME": str(desk / "cache"),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "SPARSEVLM_COMMIT": "tested",
    }
    command = [sys.executable, "-m", "benchmark.reproduce", "--model", "bundled", "--table", "spec", "--device", "cpu"]
    command += ["--include-path", "tasks", "--out", out, "--batch-size", "4", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=desk, env=environment, start_new_session=True, **pipes)


def run(desk, out, *arguments):
    process = start(desk, out, *arguments)
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def stored(desk, out):
    return {file: file.stat().st_mtime_ns for file in (desk / out / "results").glob("*/*.json")}


@pytest.fixture(scope="module")
def resumed(desk):
    """A run that is interrupted, loses half of a file, and goes on: what was stored before, and its end."""
    process = start(desk, "out", *TABLE)
    deadline = time.monotonic() + 400
    while len(stored(desk, "out")) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    before = stored(desk, "out")
    assert 2 <= len(before) < len(TASKS) * len(SETTINGS)
    halved = min(before)
    halved.write_text(halved.read_text()[:100])
    return before, halved, run(desk, "out", *TABLE)


def rows(desk, out):
    with (desk / out / "table.csv").open(newline="") as file:
        return {(row["selector"], row["task"]): row for row in csv.DictReader(file)}


def test_an_interrupted_run_goes_on(desk, resumed):
    before, halved, (status, page, errors) = resumed
    assert status == 0, errors
    after = stored(desk, "out")
    assert len(after) == len(TASKS) * len(SETTINGS)
    assert {file for file in before if after[file] != before[file]} == {halved}
    assert page.strip() == (desk / "out" / "table.md").read_text().strip()
    assert not list((desk / "out").rglob("*.tmp"))


def test_the_figures_are_the_stock_metrics(desk, resumed):
    found = rows(desk, "out")
    assert set(found) == {(name, task) for name in ("dense", "span", "downsample") for task in (*TASKS, "average")}
    metrics = {task: found["dense", task]["metric"] for task in TASKS}
    assert metrics == {
        "local_mme": "mme_perception_score",
        "local_textvqa_val": "exact_match",
        "local_pope": "pope_f1_score",
        "local_gqa": "exact_match",
        "local_docvqa_val": "anls",
        "local_chartqa": "relaxed_overall",
    }
    samples = (desk / "out" / "results" / "dense" / "local_chartqa.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in samples]
    right = [one["scores"]["relaxed_overall"] for one in answers]
    assert right == [float(one["answer"].strip() == one["target"]) for one in answers]
    assert float(found["dense", "local_chartqa"]["score"]) == pytest.approx(sum(right) / len(SEEDS))
    assert all(float(found["dense", task]["score"]) > 0 for task in TASKS), "the bundled model knows its own scenes"


def test_what_is_retained_and_the_tokens(desk, resumed):
    _, _, (_, page, _) = resumed
    found = rows(desk, "out")
    for task in TASKS:
        dense, span, smaller = (found[name, task] for name in ("dense", "span", "downsample"))
        assert dense["n"] == span["n"] == str(8 if task == "local_mme" else 4)
        assert float(dense["visual_tokens"]) == 256
        assert float(span["visual_tokens"]) == 256
        assert 100 < float(span["tokens_at_outputs"]) < float(span["tokens_at_inputs"]) <= 128
        assert float(smaller["visual_tokens"]) == float(smaller["tokens_at_inputs"]) == 11 * 11
        assert float(span["retained"]) == pytest.approx(100 * float(span["score"]) / float(dense["score"]), abs=0.02)
        assert float(span["ci_low"]) <= float(span["retained"]) <= float(span["ci_high"])
    average = found["span", "average"]
    assert float(average["ci_low"]) <= float(average["retained"]) <= float(average["ci_high"])
    assert "| `downsample` | 128 | 121.0 / 121.0 |" in page
    assert "No published table fits this checkpoint and these budgets." in page


def test_finished_results_are_not_run_again_and_others_are_refused(desk, resumed):
    before = stored(desk, "out")
    status, page, errors = run(desk, "out", *TABLE)
    assert (status, page.strip()) == (0, (desk / "out" / "table.md").read_text().strip()), errors
    status, page, errors = run(desk, "out", *TABLE, "--limit", "2")
    assert (status, page) == (2, "")
    assert "is a result of another kind: limit is None there and 2 now. Write elsewhere with --out" in errors
    assert stored(desk, "out") == before


def test_a_task_that_fails_loses_no_other_in_two_processes(desk):
    """The processes end with the task that fails; others run what is left."""
    tasks = ["--tasks", "local_bad,local_mme", "--selectors", "dense", "--processes", "2"]
    status, page, errors = run(desk, "failing", *tasks)
    assert status == 1, errors
    (file,) = stored(desk, "failing")
    assert file.stem == "local_mme"
    assert json.loads(file.read_text())["origin"]["processes"] == "2"
    assert json.loads(file.read_text())["n"] == 8
    assert "1 without a result:" in page
    assert "- dense, local_bad: " in page
    assert "Traceback" in (desk / "failing" / "results" / "dense" / "local_bad.error.txt").read_text()
    assert "failed: dense, local_bad: " in errors


def test_a_dry_run_runs_nothing(desk):
    status, page, errors = run(desk, "dry", *TABLE, "--limit", "2", "--dry-run")
    assert status == 0, errors
    assert "| span_128 | `selector=span,keep=128` | 109, 109, 109, 109, 109, 109 | 127.4 | 121.2 |" in page
    assert "--model_args pretrained=bundled,n_visual=256,dtype=float32,device=cpu,batch_size=4,keep=dense" in page
    assert "18 of 18 results are missing, an unknown number of answers" in page
    assert not (desk / "dry").exists()


def test_an_unknown_task_and_a_missing_data_set_are_refused(desk):
    status, _, errors = run(desk, "none", "--tasks", "local_mm")
    assert status == 2
    assert "lmms-eval has no task 'local_mm'" in errors
    status, _, errors = run(desk, "none", "--tasks", "local_mme,chartqa", "--selectors", "dense")
    assert status == 2
    assert "data sets lmms-lab-encoder/ChartQA are not here: --download lets lmms-eval fetch them" in errors
    assert not (desk / "none").exists()
