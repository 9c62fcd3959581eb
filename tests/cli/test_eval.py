"""``sparsevlm eval`` from the command line to its files, on small models."""

import csv
import io
import json
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from sparsevlm.cli import app
from sparsevlm.evaluation import EvalConfig, EvaluationRun
from sparsevlm.evaluation.execution import workers
from sparsevlm.evaluation.execution.generation import BatchGenerator, generate_each
from sparsevlm.evaluation.execution.predictions import PredictionStore
from sparsevlm.evaluation.execution.sharding import Shard
from sparsevlm.evaluation.suites.suite import Sample
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.selectors import SELECTORS
from tiny_checkpoint import save_tiny_checkpoint

SETTINGS = ["--selectors", "sparsevlm,random,downsample", "--keep", "0.6", "--seeds", "0,1", "--max-new-tokens", "3"]
PRUNING = ["--set", "min_keep=8"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A checkpoint, and a dataset of six rows of which two are bad."""
    desk = tmp_path_factory.mktemp("desk")
    save_tiny_checkpoint(desk / "model")
    for number in range(5):
        Image.linear_gradient("L").rotate(40 * number).resize((170 + 28 * number, 140)).save(desk / f"{number}.png")
    rows = [{"image": f"{number}.png", "question": f"What is {number}?", "answer": "red"} for number in range(4)]
    rows.insert(1, {"image": "missing.png", "question": "What?", "answer": "red"})
    rows.insert(3, {"image": "4.png", "question": "What?"})
    (desk / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return desk


def call(desk, *arguments, suite="data.jsonl", settings=SETTINGS, batch=2):
    place = ["--suite", desk / suite if suite == "data.jsonl" else suite, "--model", desk / "model", "--device", "cpu"]
    options = [*place, *settings, *PRUNING, "--batch", batch, *arguments]
    return CliRunner().invoke(app, ["eval", *map(str, options)])


def run_of(desk, **options):
    common = {"selectors": ("random", "downsample"), "keeps": (0.6,), "batch": 2, "max_new_tokens": 3, "device": "cpu"}
    common |= {"suite": str(desk / "data.jsonl"), "model": str(desk / "model"), "options": {"min_keep": 8}}
    config = EvalConfig(**{**common, **options})
    return lambda out: EvaluationRun(config, out)


def answers(folder):
    """What was predicted, without times."""
    found = PredictionStore(folder / "predictions").read()
    return {
        name: {place: {key: value for key, value in one.items() if key != "ms"} for place, one in rows.items()}
        for name, rows in found.items()
    }


def n_lines(folder):
    return sum(len(file.read_text().splitlines()) for file in (folder / "predictions").glob("*.jsonl"))


@pytest.fixture(scope="module")
def done(desk):
    result = call(desk, "--out", desk / "done", "--append-to", desk / "accuracy.csv")
    assert result.exit_code == 0, result.stderr
    (folder,) = (desk / "done").iterdir()
    return result, folder


def test_what_is_printed(done):
    result, folder = done
    words = result.stdout.split()
    assert {"dense", "sparsevlm", "random", "downsample", "0+1"} <= set(words)
    assert f"wrote {folder}" in result.stdout
    assert "no score: data, 2: line 2 of data.jsonl has an unusable image" in result.stderr
    assert "no score: data, 4: line 4 of data.jsonl has no answer" in result.stderr
    assert folder.name.startswith("data-model-")


def test_what_is_written(done, desk):
    _, folder = done
    names = ("config.json", "metrics.csv", "plot.png", "plot.svg", "predictions", "table.md")
    assert sorted(file.name for file in folder.iterdir() if file.name != ".lock") == sorted(names)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["options"] == {"min_keep": 8}
    assert {"commit", "torch", "transformers", "weights", "data"} <= set(stored["versions"])
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["selector"], row["seed"]) for row in rows] == [
        ("dense", ""),
        ("sparsevlm", ""),
        ("random", "0"),
        ("random", "1"),
        ("random", "0+1"),
        ("downsample", ""),
    ]
    assert {(row["n"], row["n_failed"], row["dtype"]) for row in rows} == {("4", "2", "float32")}
    assert list(csv.DictReader((desk / "accuracy.csv").open())) == rows


def test_tokens_are_those_that_were_computed(done):
    _, folder = done
    found = PredictionStore(folder / "predictions").read()
    for place, dense in found["dense"].items():
        if "error" in dense:
            continue
        ours, small = found["sparsevlm-keep0.6"][place], found["downsample-keep0.6"][place]
        assert dense["avg_tokens"] == dense["n_visual"] == ours["n_visual"]
        assert 0.5 * dense["n_visual"] < ours["avg_tokens"] <= 0.6 * dense["n_visual"]
        assert 0.4 * dense["n_visual"] < small["n_visual"] <= 0.6 * dense["n_visual"]
        assert small["avg_tokens"] == small["n_visual"]
        assert ours["tflops"] < dense["tflops"]
        assert (dense["path"], ours["path"], small["path"]) == ("dense", "plain", "dense")


def test_dense_is_what_the_model_says(done, desk):
    _, folder = done
    generator = BatchGenerator(EvalConfig("x", str(desk / "model"), device="cpu"), 3)
    model, processor = generator.model, generator.processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is 2?"}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.open(desk / "2.png").convert("RGB")], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    text = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
    assert PredictionStore(folder / "predictions").read()["dense"]["data", "5"]["prediction"] == text


def test_a_finished_run_is_not_repeated(done, desk):
    _, folder = done
    before = n_lines(folder)
    again = call(desk, "--out", desk / "done", "--append-to", desk / "accuracy.csv")
    assert again.exit_code == 0, again.stderr
    assert n_lines(folder) == before
    assert len(list(csv.DictReader((desk / "accuracy.csv").open()))) == 6


def test_a_budget_and_a_seed_in_two_spellings_run_once(desk, tmp_path, monkeypatch):
    """And a busy machine is told of before, and beneath the table."""
    monkeypatch.setattr("sparsevlm.cli.busy.busy_advice", lambda threads, *_: f"{threads} thread waits")
    settings = ["--selectors", "random", "--keep", "0.6,0.60", "--seeds", "0,00", "--max-new-tokens", "2"]
    result = call(desk, "--out", tmp_path, settings=settings)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("warning: 1 thread waits") == 2
    (folder,) = tmp_path.iterdir()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["selector"], row["keep"], row["seed"]) for row in rows] == [
        ("dense", "1.0", ""),
        ("random", "0.6", "0"),
    ]


def test_rows_that_cannot_be_appended_cost_nothing_else(desk, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("sparsevlm.evaluation.run.append_rows", fail)
    few = ["--selectors", "grid", "--keep", "0.6", "--max-new-tokens", "2"]
    result = call(desk, "--out", tmp_path / "out", "--append-to", tmp_path / "accuracy.csv", settings=few)
    assert (result.exit_code, "disk full" in result.stderr) == (2, True)
    (folder,) = (tmp_path / "out").iterdir()
    assert {"metrics.csv", "table.md", "plot.png", "plot.svg"} <= {file.name for file in folder.iterdir()}


def test_strict_ends_with_a_code_of_its_own(done, desk):
    assert call(desk, "--out", desk / "done", "--strict").exit_code == 3


def test_a_run_goes_on_after_an_interruption_and_a_torn_line(desk, tmp_path):
    make = run_of(desk)
    whole = make(tmp_path / "whole").execute()
    seen = []

    def stop(n_rows):
        seen.append(n_rows)
        if sum(seen) > 9:
            raise KeyboardInterrupt

    broken = make(tmp_path / "broken")
    with pytest.raises(KeyboardInterrupt):
        broken.execute(on_rows=stop)
    begun = answers(broken.folder)
    assert 0 < sum(map(len, begun.values())) < sum(map(len, answers(whole.folder).values()))
    torn = broken.folder / "predictions" / "random-keep0.6-seed0.jsonl"
    torn.write_bytes(torn.read_bytes()[:-20])
    rows = []
    resumed = make(tmp_path / "broken").execute(on_rows=rows.append)
    assert answers(resumed.folder) == answers(whole.folder)
    assert n_lines(resumed.folder) == n_lines(whole.folder), "no row twice"
    assert sum(rows) == broken.n_total


def test_a_killed_run_goes_on(desk, tmp_path):
    command = "from sparsevlm.cli import main; main()"
    place = [
        "--suite",
        desk / "data.jsonl",
        "--model",
        desk / "model",
        "--device",
        "cpu",
        "--batch",
        1,
        "--out",
        tmp_path,
    ]
    arguments = ["eval", *place, *SETTINGS, *PRUNING]
    process = subprocess.Popen([sys.executable, "-c", command, *map(str, arguments)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/predictions/downsample*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = tmp_path.iterdir()
    assert 0 < n_lines(folder) < 30, "killed on the way"
    assert call(desk, "--out", tmp_path, batch=1).exit_code == 0
    assert n_lines(folder) == 30
    assert {name: len(rows) for name, rows in answers(folder).items()} == dict.fromkeys(answers(folder), 6)


def test_two_workers_say_what_one_says(desk, tmp_path):
    make = run_of(desk)
    one, two = make(tmp_path / "one").execute(), make(tmp_path / "two").execute(workers=2)
    assert answers(one.folder) == answers(two.folder)
    assert [vars(a) | {"latency_ms": 0} for a in one.results] == [vars(b) | {"latency_ms": 0} for b in two.results]
    assert "2 workers shared the device" in (two.folder / "table.md").read_text()
    assert len(list((two.folder / "predictions").glob("*.worker1.jsonl"))) == 3


def test_the_failure_of_a_worker_is_told(desk, tmp_path, monkeypatch):
    """The work of a process, in this one; what it says goes through a pipe."""
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    run, messages = run_of(desk, instruction="<|image_pad|>")(tmp_path), queue.Queue()
    workers._work(run.config, tmp_path, Shard(0, 2), run._settings, messages)
    said = [messages.get() for _ in range(messages.qsize())]
    assert [kind for _, kind, _ in said if kind != "rows"] == ["failed"]
    for message in said:
        messages.put(pickle.loads(pickle.dumps(message)))
    with pytest.raises(ValueError, match=r"image_pad"):
        workers._follow([SimpleNamespace(exitcode=None)], messages, print)


def test_the_end_of_a_killed_worker_is_told(desk, tmp_path, monkeypatch):
    def killed(*_):
        follow([SimpleNamespace(exitcode=-9)], queue.Queue(), print)

    follow = workers._follow
    monkeypatch.setattr(workers, "_follow", killed)
    monkeypatch.setattr(workers, "_work", print)
    result = call(desk, "--out", tmp_path, "--workers", 2)
    assert result.exit_code == 2
    assert "\nerror: worker 0 ended with exit code -9" in result.stderr


def test_a_mended_row_is_tried_again(desk, tmp_path):
    (tmp_path / "data.jsonl").write_text((desk / "data.jsonl").read_text())
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes((desk / f"{number}.png").read_bytes())
    make = run_of(desk)
    config = make(tmp_path).config
    mended = EvalConfig(**{**vars(config), "suite": str(tmp_path / "data.jsonl")})
    first = EvaluationRun(mended, tmp_path / "out").execute()
    assert set(first.failed) == {("data", "2"), ("data", "4")}
    Image.new("RGB", (100, 100), "red").save(tmp_path / "missing.png")
    second = EvaluationRun(mended, tmp_path / "out").execute()
    assert set(second.failed) == {("data", "4")}
    assert {one.n for one in second.results} == {5}


def test_half_of_a_character_costs_its_row_only(desk, tmp_path):
    good = {"image": str(desk / "0.png"), "question": "What?", "answer": "red"}
    rows = [good, {**good, "answer": "\ud800"}, {**good, "id": "\ud800"}, {**good, "image": "\ud800.png"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_of(desk, suite=str(tmp_path / "data.jsonl"))
    for _ in range(2):
        done = run(tmp_path / "out").execute()
        assert set(done.failed) == {("data", "2"), ("data", r"\ud800"), ("data", "4")}
        assert {one.n for one in done.results} == {1}


def test_only_the_row_at_fault_is_without_an_answer(desk):
    config = EvalConfig("x", str(desk / "model"), device="cpu")
    generator = BatchGenerator(config, 2)
    (dense,) = [setting for setting in run_of(desk)(desk)._settings if setting.selector == "dense"]
    image = Image.new("RGB", (100, 100), "red")
    samples = [Sample((image,), text, ("x",), "exact") for text in ("What?", "Is <|image_pad|> one?", "Who?")]
    outcomes = generate_each(lambda batch: generator.generate(dense, batch), samples)
    assert isinstance(outcomes[1], Exception)
    alone = [generator.generate(dense, [samples[i]])[0].text for i in (0, 2)]
    assert [outcomes[0].text, outcomes[2].text] == alone
    with pytest.raises((ValueError, RuntimeError)):
        generate_each(lambda batch: generator.generate(dense, batch), [samples[1], samples[1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selectors", "best"], "there is no selector 'best'"),
        (["--tasks", "poem"], "has no task 'poem'; it has data"),
        (["--keep", "0.01"], "cannot run: keep=0.01 cannot hold on target layers"),
        (["--target-layers", "2,99"], "sparsevlm-keep0.6 cannot run: target_layers [99] are out of range"),
        (
            ["--selectors", "sparsevlm,tome", "--target-layers", "2"],
            "tome-keep0.6 cannot run: selector 'tome' runs before",
        ),
        (["--selectors", "downsample", "--keep", "adaptive"], "downsample needs a budget that is a size"),
        (["--keep", "much"], "got 'much'"),
        (["--seeds", "one"], "--seeds must be whole numbers"),
        (["--selectors", ","], "--selectors is empty"),
        (["--set", "tau"], "--set must be name=value"),
        (["--set", "tau=high"], "tau must be a number"),
        (["--metric", "bleu"], "there is no metric 'bleu'"),
        (["--model", "missing"], "is neither a folder nor a hub id"),
        (["--first-seed", "5"], "of what is drawn only"),
        (["--append-to", "data.jsonl"], "has other columns"),
        (["--append-to", "data.jsonl/a.csv"], "rows cannot be added to data.jsonl/a.csv"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_options_end_in_one_line(desk, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(desk)
    monkeypatch.setattr("sparsevlm.cli.busy.busy_advice", lambda *_: "milliseconds are spoilt")
    result = call(desk, *arguments, "--out", tmp_path)
    assert result.exit_code == 2, result.output
    assert ("milliseconds are spoilt" in result.stderr) == (arguments[0] == "--append-to"), "a mistake is refused first"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_a_folder_of_another_run_is_refused_and_can_be_started_anew(desk, tmp_path):
    few = ["--selectors", "grid", "--keep", "0.6", "--max-new-tokens", "2"]
    assert call(desk, "--out", tmp_path, settings=few).exit_code == 0
    (folder,) = tmp_path.iterdir()
    config = json.loads((folder / "config.json").read_text())
    config["versions"]["weights"] = "other"
    (folder / "config.json").write_text(json.dumps(config))
    refused = call(desk, "--out", tmp_path, settings=few)
    assert refused.exit_code == 2
    assert "weights is 'other' there" in " ".join(refused.stderr.split())
    assert call(desk, "--out", tmp_path, "--no-resume", settings=few).exit_code == 0


def test_scenes_of_the_package(desk, tmp_path):
    arguments = [
        "--tasks",
        "box,pair",
        "--limit",
        2,
        "--selectors",
        "grid,downsample",
        "--keep",
        "0.6",
        "--out",
        tmp_path,
    ]
    result = call(desk, *arguments, suite="demo", settings=["--max-new-tokens", 2])
    assert result.exit_code == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["task"] for row in rows] == ["box", "pair", "average"] * 3
    assert rows[0]["mean_iou"] == "0.0"
    assert {row["n"] for row in rows} == {"2", "4"}


def test_the_bundled_model(tmp_path):
    arguments = ["--limit", 2, "--tasks", "number", "--selectors", "sparsevlm", "--keep", 0.8, "--batch", 2]
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    ours = list(csv.DictReader((folder / "metrics.csv").open()))[1]
    assert (ours["model"], ours["suite"], ours["n"], ours["n_visual"]) == ("bundled", "demo", "2", "256.0")
    assert 180 < float(ours["avg_tokens"]) <= 0.8 * 256


def test_tasks_of_lmms_eval(desk, tmp_path, monkeypatch):
    pytest.importorskip("lmms_eval", exc_type=ImportError)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    stream = io.BytesIO()
    Image.new("RGB", (112, 84), "red").save(stream, "PNG")
    rows = [{"image": stream.getvalue(), "question": f"What is {number}?", "answer": "red"} for number in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "tiny_pictures.py").write_text(
        "import io\nfrom PIL import Image\ndef pictures(doc):\n    return [Image.open(io.BytesIO(doc['image']))]\n"
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny\ndataset_path: parquet\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.parquet'}\n"
        "doc_to_visual: !function tiny_pictures.pictures\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\ngeneration_kwargs:\n  max_new_tokens: 3\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    place = ["--include-path", tmp_path, "--out", tmp_path / "out"]
    settings = ["--selectors", "random,downsample", "--keep", "0.6"]
    unknown = call(desk, *place, suite="lmms:tin", settings=settings)
    assert unknown.exit_code == 2
    assert "lmms-eval has no task 'tin'; near are" in unknown.stderr
    bad = call(desk, *place, suite="lmms:tiny", settings=["--selectors", "random", "--keep", "0.6,0.01"])
    assert bad.exit_code == 2
    assert "random-keep0.01-seed0 cannot run: keep=0.01 cannot hold" in bad.stderr
    assert not (tmp_path / "out").exists(), "nothing was begun"
    result = call(desk, *place, suite="lmms:tiny", settings=settings)
    assert result.exit_code == 0, result.stderr
    (folder,) = (tmp_path / "out").iterdir()
    dense, random, smaller = csv.DictReader((folder / "metrics.csv").open())
    assert (dense["task"], dense["n"], dense["n_visual"], dense["avg_tokens"]) == ("tiny", "3", "12.0", "12.0")
    assert 8 <= float(random["avg_tokens"]) < 12
    assert float(smaller["n_visual"]) == float(smaller["avg_tokens"]) <= 0.6 * 12
    before = {file: file.stat().st_mtime_ns for file in (folder / "predictions").iterdir()}
    assert call(desk, *place, suite="lmms:tiny", settings=settings).exit_code == 0
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "predictions").iterdir()}, "not run again"


def test_the_options_of_the_docs_exist():
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    options = [
        option for one in get_command(app).commands["eval"].params for option in (*one.opts, *one.secondary_opts)
    ]
    others = {"--source", "--parts", "--no-deps"}  # of smol-weights and of pip
    assert {"--strict", "--suite"} <= set(re.findall(r"--[a-z]+(?:-[a-z]+)*", text)) - others <= set(options)


def test_defaults_of_a_cpu_are_a_comparison_of_minutes(monkeypatch):
    asked = []

    def prepared(config, out):
        asked.append(config)
        raise ValueError("stop")

    monkeypatch.setattr("sparsevlm.cli.evaluate._prepared", prepared)
    CliRunner().invoke(app, ["eval", "--device", "cpu"])
    CliRunner().invoke(app, ["eval", "--device", "cpu", "--suite", "data.jsonl", "--batch", "3"])
    monkeypatch.setattr("sparsevlm.inputs.pick_device", lambda device: "cuda")
    CliRunner().invoke(app, ["eval"])
    found = [(len(config.selectors), config.keeps, config.limit, config.batch) for config in asked]
    assert found == [(3, (0.5, 0.25), 20, 8), (3, (0.5, 0.25), None, 3), (1, (0.5, 0.37, 0.25), None, 32)]
    assert asked[-1].selectors == ("all",)


def test_selectors_of_a_cpu_that_nobody_named_fit_target_layers(monkeypatch):
    asked = []
    monkeypatch.setattr("sparsevlm.cli.evaluate._prepared", lambda config, out: asked.append(config) or sys.exit())
    for more in ([], ["--target-layers", "2,6"]):
        CliRunner().invoke(app, ["eval", "--device", "cpu", *more])
    assert [config.selectors[0] for config in asked] == ["span-features", "span"]
    placements = [SelectorTraits.of(SELECTORS[name]()).placement for name in asked[1].selectors]
    assert BEFORE_DECODER not in placements


def test_an_evaluation_that_takes_long_is_asked_about(desk, tmp_path, monkeypatch):
    """Behind the first batch, which is kept."""
    monkeypatch.setattr("sparsevlm.cli.terminal._LONG", 0.0)
    result = call(desk, "--out", tmp_path)
    assert result.exit_code == 2
    assert "add --yes to start it, or choose fewer --selectors" in result.stderr
    (folder,) = tmp_path.iterdir()
    assert n_lines(folder) == 2
    result = call(desk, "--out", tmp_path, "--yes")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"the rest takes about \d+ (s|min)", result.stderr)
