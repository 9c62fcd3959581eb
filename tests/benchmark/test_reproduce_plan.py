"""Plan, result files, scores and tables of ``python -m benchmark.reproduce``; lmms-eval is not needed."""

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from benchmark.reproduce import checks
from benchmark.reproduce.__main__ import main, plan_lines
from benchmark.reproduce.child import read_metrics
from benchmark.reproduce.plan import PAPER, TABLES, Setting, make_settings, parse_keep
from benchmark.reproduce.published import Ours, comparisons, fitting, published_of, share_of
from benchmark.reproduce.report import csv_text, make_lines, markdown
from benchmark.reproduce.runs import Options, estimate, missing_tasks, run_setting
from benchmark.reproduce.scores import headline, paired, retained_with_interval, task_score, units_of
from benchmark.reproduce.store import Result, Store, check_same
from benchmark.validity import read_published

from sparsevlm.evaluation.metrics.bootstrap import retained

DENSE = Setting("dense", "", {"keep": "dense"})
SPAN = Setting("span", "64", {"selector": "span", "keep": "64"})


def arguments(table, n_layers=28, **changes):
    plan = TABLES[table]
    given = {"selectors": plan.selectors, "keeps": plan.keeps, "counted": plan.counted, **changes}
    settings = make_settings(given["selectors"], given["keeps"], given["counted"], plan.n_visual, n_layers)
    return {setting.name: setting.arguments_text for setting in settings}


def test_the_budgets_of_the_specification():
    found = arguments("spec")
    assert list(found)[:4] == ["dense", "sparsevlm_128", "sparsevlm_96", "sparsevlm_64"]
    assert len(found) == 1 + 4 * 3
    assert found["dense"] == "keep=dense"
    assert found["span-features_64"] == "selector=span-features,keep=64"
    assert found["downsample_96"] == "selector=downsample,keep=96"
    assert arguments("spec", counted="outputs", selectors=["sparsevlm"]) == {
        "dense": "keep=dense",
        "sparsevlm_128": "selector=sparsevlm,keep=135",
        "sparsevlm_96": "selector=sparsevlm,keep=104",
        "sparsevlm_64": "selector=sparsevlm,keep=72",
    }


def test_the_budgets_of_the_paper():
    """Presets are of the paper's selectors alone; the least budget needs earlier target layers."""
    found = arguments("paper", selectors=[PAPER, "sparsevlm", "divprune", "downsample"])
    assert found["sparsevlm-paper_paper-192"] == f"selector={PAPER},preset=paper-192"
    assert found["sparsevlm_paper-192"] == "selector=sparsevlm,preset=paper-192"
    assert found["sparsevlm-paper_192"] == f"selector={PAPER},keep=211"
    assert found["sparsevlm-paper_64"] == f"selector={PAPER},keep=83,target_layers=1;5;9;13;17;21;25"
    assert found["divprune_64"] == "selector=divprune,keep=64"
    assert found["downsample_64"] == "selector=downsample,keep=64"
    assert "divprune_paper-64" not in found
    at_inputs = arguments("paper", selectors=[PAPER], counted="inputs", keeps=[64])
    assert at_inputs["sparsevlm-paper_64"] == f"selector={PAPER},keep=64,target_layers=0;4;8;12;16;20;24"


@pytest.mark.parametrize("n_layers", [24, 28, 32, 36])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("counted", ["inputs", "outputs"])
def test_budgets_hold_on_every_depth(table, counted, n_layers):
    plan = TABLES[table]
    keeps = [keep for keep in plan.keeps if isinstance(keep, int)]
    for setting in make_settings(["sparsevlm", "span", "divprune"], keeps, counted, plan.n_visual, n_layers)[1:]:
        average = setting.planned.at_inputs if counted == "inputs" else setting.planned.at_outputs
        assert abs(average - int(setting.keep)) <= 1


PLAN = re.compile(r"<!-- plan: (\w+), (\d+) layers, (\w+) -->\n(.*?)<!-- end of plan -->", flags=re.DOTALL)


def test_the_plans_of_the_document_are_these():
    page = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    tables = PLAN.findall(page)
    assert [name for name, *_ in tables] == list(TABLES)
    for name, n_layers, counted, lines in tables:
        plan = TABLES[name]
        assert counted == plan.counted
        settings = make_settings(plan.selectors[:1], plan.keeps, counted, plan.n_visual, int(n_layers))
        heads = plan_lines(settings, plan.n_visual, int(n_layers))[2:4]
        assert lines.strip().splitlines() == [*heads, *plan_lines(settings[1:], plan.n_visual, int(n_layers))[4:]]
        (cells,) = [line for line in page.splitlines() if line.startswith("| tasks |")]
        assert ", ".join(f"`{task}`" for task in plan.tasks) in cells.strip("| ").split(" | ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keeps": [3]}, "--keep 3 of 256 visual tokens, averaged over the inputs of 28 layers, is less than"),
        ({"keeps": ["paper-64"], "selectors": ["span"]}, "--keep paper-64 holds presets only"),
    ],
)
def test_plans_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        arguments("spec", **given)


def test_budgets_of_the_command_line():
    assert [parse_keep(text) for text in ("64", "0.25", "paper-64")] == [64, 0.25, "paper-64"]
    for text in ("half", "0", "1.5", "adaptive"):
        with pytest.raises(ValueError, match=r"--keep must be tokens \(64\), fractions \(0.25\) or presets"):
            parse_keep(text)


def result(score=1.0, n=4, **fingerprint):
    tokens = {"visual": 256.0, "inputs": 64.0, "outputs": 60.0}
    origin = {"batch_size": "8", "processes": "1", "device": "CPU", "timestamp": "t"}
    return Result({"limit": None, **fingerprint}, {"exact_match": score}, n, tokens, 2.0, origin)


def samples(*scores):
    return [{"id": i, "answer": "", "target": "", "scores": {"exact_match": one}} for i, one in enumerate(scores)]


def test_half_a_result_is_none(tmp_path):
    store = Store(tmp_path)
    store.begin("dense", "gqa")
    assert "ended before the task did" in store.failure("dense", "gqa")
    store.write("dense", "gqa", result(), samples(1, 1))
    assert store.failure("dense", "gqa") is None
    assert store.read("dense", "gqa") == result()
    file = store.file("dense", "gqa")
    for text in (file.read_text()[:50], "{}", "[1]"):
        file.write_text(text)
        assert store.read("dense", "gqa") is None


def test_a_result_of_another_kind_is_refused(tmp_path):
    check_same(result(weights="a"), {"limit": None, "weights": "a"}, tmp_path)
    with pytest.raises(ValueError, match="limit is None there and 8 now; weights is 'a' there and 'b' now"):
        check_same(result(weights="a"), {"limit": 8, "weights": "b"}, tmp_path)


def test_a_second_run_in_one_folder_is_refused(tmp_path):
    first, second = Store(tmp_path).locked(), Store(tmp_path).locked()
    with first, pytest.raises(ValueError, match="is in use by another run"), second:
        pass


OPTIONS = Options({"pretrained": "bundled"}, None, None, 1, download=False)


def test_only_what_is_missing_is_run(tmp_path):
    store, current = Store(tmp_path), {"dense": {"gqa": {"limit": None}, "pope": {"limit": None}}}
    store.write("dense", "gqa", result(n=10), samples(1))
    missing = missing_tasks(store, [DENSE], current)
    assert missing == {"dense": ["pope"]}
    assert estimate(store, missing, None) == (9000, 9000 * 2.0 / 10)
    assert estimate(store, missing, 100) == (100, 20.0)
    assert estimate(store, {"dense": ["local"]}, None) == (None, None)
    assert estimate(Store(tmp_path / "none"), missing, None) == (9000, None)


def test_a_process_that_ends_amid_a_task_leaves_the_others_to_another(tmp_path):
    store, started = Store(tmp_path), []

    def start(command, environment):
        job = json.loads((tmp_path / "job.json").read_text())
        assert command[1:3] == ["-m", "benchmark.reproduce.child"]
        assert environment["HF_HUB_OFFLINE"] == "1"
        started.append(list(job["tasks"]))
        for task in job["tasks"]:
            store.begin("dense", task)
            if task == "b":
                return -9
            store.write("dense", task, result(), samples(1))
        return 0

    run_setting(store, DENSE, {name: {} for name in "abc"}, OPTIONS, start)
    assert started == [["a", "b", "c"], ["c"]]
    assert [store.failure("dense", task) is None for task in "abc"] == [True, False, True]
    run_setting(store, SPAN, {"a": {}, "b": {}}, OPTIONS, lambda command, environment: 1)
    assert store.failure("span_64", "b") == "the process ended with status 1 before any task began"


def test_the_same_as_a_command_of_lmms_eval():
    command = Options({"pretrained": "m"}, None, 8, 4, download=False).command(SPAN, ["mme", "gqa"])
    assert command == (
        "python -m torch.distributed.run --standalone --nproc-per-node 4 -m lmms_eval --model sparsevlm --model_args "
        "pretrained=m,selector=span,keep=64 --tasks mme,gqa --log_samples --limit 8"
    )


def test_metrics_of_which_less_is_better_are_left_out():
    results = {
        "t": {"alias": "t", "exact_match,none": 0.5, "wer,none": 0.1, "exact_match_stderr,none": 1, "x,none": "?"}
    }
    output = {"results": results, "higher_is_better": {"t": {"wer": False}}}
    assert read_metrics(output, "t") == {"exact_match": 0.5}
    with pytest.raises(ValueError, match="task t has no number of which more is better"):
        read_metrics({"results": {"t": {"wer,none": 0.1}}, "higher_is_better": {"t": {"wer": False}}}, "t")


def test_one_score_for_each_task():
    assert task_score({"mme_perception_score": 1200.0, "mme_cognition_score": 300.0}) == 1500
    assert headline({"pope_accuracy": 1, "pope_f1_score": 1}) == ("pope_f1_score",)
    assert headline({"own": 1}) == ("own",)
    with pytest.raises(ValueError, match="none of the metrics a, b is known as the score of a task"):
        headline({"a": 1, "b": 2})


def mme(*scores):
    """Two questions about each of two images in one category, and about one in another."""
    places = [("count", "1"), ("count", "1"), ("count", "2"), ("count", "2"), ("code_reasoning", "1")]
    places.append(places[-1])
    names = ["mme_perception_score"] * 4 + ["mme_cognition_score"] * 2
    return [
        {"id": i, "scores": {name: {"category": category, "question_id": question, "score": float(score)}}}
        for i, (name, (category, question), score) in enumerate(zip(names, places, scores, strict=True))
    ]


def test_mme_is_drawn_by_pairs_within_categories():
    names = ("mme_perception_score", "mme_cognition_score")
    units = units_of(names, mme(1, 1, 1, 0, 1, 1))
    assert units.sizes == {"code_reasoning": 1, "count": 2}
    assert units.plain_score() == (200 + 50) / 2 + 200
    pair = paired(names, (250.0, mme(1, 0, 1, 0, 1, 1)), (325.0, mme(1, 1, 1, 0, 1, 1)))
    found = retained_with_interval({"mme": 100 * 250 / 325}, {"mme": pair})
    assert found.low < found.value < found.high
    assert found.low == pytest.approx(100 * 250 / 400)
    assert found.high == 100
    assert paired(names, (251.0, mme(1, 0, 1, 0, 1, 1)), (325.0, mme(1, 1, 1, 0, 1, 1))) is None


def pope(said, right):
    values = [{"prediction": one, "ground_truth": other} for one, other in zip(said, right, strict=True)]
    return [{"id": i, "scores": {"pope_f1_score": value}} for i, value in enumerate(values)]


def test_f1_is_that_of_lmms_eval():
    right = ["yes", "yes", "yes", "no", "no"]
    assert units_of(("pope_f1_score",), pope(["yes", "no", "a cat", "yes", "no"], right)).plain_score() == (
        pytest.approx(2 * 0.5 * 0.5 / 1)  # what is neither yes nor no counts as neither
    )
    assert units_of(("pope_f1_score",), pope(["no"] * 5, right)).plain_score() == 0


def test_the_interval_of_means_is_that_of_the_package():
    generator = np.random.default_rng(0)
    dense, pruned = (generator.integers(0, 2, 50).astype(float) for _ in range(2))
    pair = paired(("exact_match",), (100 * pruned.mean(), samples(*pruned)), (100 * dense.mean(), samples(*dense)))
    value = 100 * pruned.mean() / dense.mean()
    found = retained_with_interval({"t": value}, {"t": pair})
    order = sorted(range(50), key=str)
    theirs = retained({"t/": (pruned[order], dense[order])})
    assert (found.value, found.low, found.high) == pytest.approx((theirs.value, theirs.low, theirs.high), rel=1e-5)


def test_no_interval_without_scores_of_rows():
    rows = [{"id": 0, "scores": {"gpt_eval_score": {"prediction": "A"}}}]
    assert paired(("gpt_eval_score",), (50.0, rows), (60.0, rows)) is None
    found = retained_with_interval({"a": 80.0, "b": 90.0}, {"a": None, "b": None})
    assert (found.value, math.isnan(found.low)) == (85, True)


def test_published_rows_of_a_checkpoint():
    rows = read_published()
    qwen = fitting(rows, "Qwen2.5-VL-7B-Instruct")
    assert {row["checkpoint"] for row in qwen} == {"Qwen2.5-VL-7B"}
    assert {row["checkpoint"] for row in fitting(rows, "llava-1.5-7b-hf")} == {"LLaVA-1.5-7B"}
    assert fitting(rows, "bundled") == []
    quarter = Setting("fastv", "64", {})
    assert [row["retained"] for row in published_of(qwen, Ours(quarter, share_of(quarter, 256), 90.0))] == ["87.16"]
    assert published_of(qwen, Ours(quarter, share_of(quarter, 576), 90.0)) == []


def test_the_paper_s_settings_stand_for_the_paper_s_method():
    rows = fitting(read_published(), "llava-1.5-7b-hf")
    settings = [Setting("sparsevlm", "64", {}), Setting(PAPER, "64", {}), Setting(PAPER, "paper-64", {})]
    settings += [Setting("fastv", "64", {}), Setting("visionzip", "64", {}), Setting("divprune", "64", {})]
    ours = [Ours(one, share_of(one, 576), float(place)) for place, one in enumerate(settings)]
    ours.append(Ours(Setting("v2drop", "64", {}), 64 / 576, math.nan))
    found = comparisons(rows, ours)
    assert [one.source.split(",")[0] for one in found] == ["Dong et al. (MMTok)"], "the others share fewer than three"
    assert found[0].ours == {"fastv": 3.0, "sparsevlm": 2.0, "visionzip": 4.0, "divprune": 5.0}


@pytest.fixture
def tables(tmp_path):
    """Store of dense and a pruned setting, which failed in one of two tasks."""
    store = Store(tmp_path)
    store.write("dense", "gqa", result(0.75), samples(1, 1, 1, 0))
    store.write("dense", "pope", result(1.0), samples(1, 1, 1, 1))
    store.write("span_64", "gqa", result(0.5), samples(1, 0, 1, 0))
    return store


def test_the_table(tables):
    quarter = fitting(read_published(), "Qwen2.5-VL-7B-Instruct")
    published = [{**quarter[0], "selector": "span", "retained": "91.23", "source": "Some, Table 1"}]
    failed = {("span_64", "pope"): "ValueError: no"}
    lines = make_lines([DENSE, SPAN], ("gqa", "pope"), tables)
    page = markdown("title", lines, ("gqa", "pope"), published, 256, failed)
    assert "| selector | keep | tokens | gqa | pope | average | published |" in page
    assert "| `dense` | – | 64.0 / 60.0 | 0.75 | 1 | 100.0 | – |" in page
    assert "| `span` | 64 | 64.0 / 60.0 | 0.5 (66.7 [0.0, 100.0]) | – | – | 91.2 (Some) |" in page
    assert "1 without a result:\n\n- span_64, pope: ValueError: no" in page
    assert "Kendall" not in page
    found = list(csv.DictReader(io.StringIO(csv_text("m", lines, ("gqa", "pope"), published, 256))))
    assert [(row["selector"], row["task"]) for row in found] == [
        *(("dense", task) for task in ("gqa", "pope", "average")),
        *(("span", task) for task in ("gqa", "average")),
    ]
    gqa, average = found[3:]
    assert (gqa["score"], gqa["dense_score"], gqa["retained"], gqa["metric"]) == ("0.5", "0.75", "66.67", "exact_match")
    assert (average["retained"], average["published"], average["published_in"]) == ("", "91.23", "Some, Table 1")


def test_what_differs_between_results_is_said(tables):
    other = result(1.0)
    other.origin["batch_size"] = "2"
    tables.write("span_64", "pope", other, samples(1))
    page = markdown("title", make_lines([DENSE, SPAN], ("gqa", "pope"), tables), ("gqa", "pope"), [], 256, {})
    assert "several values of batch size: 8, 2." in page
    assert "several values of device" not in page
    assert "No published table fits" in page


def test_kendall_s_tau_of_three_methods(tmp_path):
    store, names = Store(tmp_path), ("fastv", "visionzip", "divprune")
    settings = [DENSE, *(Setting(name, "64", {}) for name in names)]
    for setting, score in zip(settings, (1.0, 0.5, 0.75, 0.25), strict=True):
        store.write(setting.name, "gqa", result(score), samples(*(i < 4 * score for i in range(4))))
    published = fitting(read_published(), "Qwen2.5-VL-7B-Instruct")
    page = markdown("title", make_lines(settings, ("gqa",), store), ("gqa",), published, 256, {})
    assert "| AngelSlim, IDPruner's page at 4d6c1c8, 25 % | 1 | 2 | -0.33 |" in page


def test_a_dry_run_needs_no_checkpoint(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    given = ["--table", "spec", "--tasks", "mme,gqa", "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(["--model", "Qwen/Qwen2.5-VL-7B-Instruct", *given]) == 0
    said = capsys.readouterr().out
    assert "fetched with --download: model Qwen/Qwen2.5-VL-7B-Instruct is not here" in said
    assert "| sparsevlm_64 | `selector=sparsevlm,keep=64` | 88, 32, 32, 32, 32, 32, 32 | 64.0 | 56.0 |" in said
    assert f"26 of 26 results are missing, {13 * (2374 + 12578)} answers" in said
    assert main(["--model", "some/other", *given]) == 2
    assert "a plan needs the number of its layers: known are Qwen" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "Qwen/Qwen2.5-VL-7B-Instruct"], "is not here: --download fetches its configuration"),
        (["--model", "nowhere"], "model nowhere is neither a folder nor a hub id"),
        (["--model", "bundled", "--limit", "3"], "mme scores two questions about an image together"),
        (
            ["--model", "bundled", "--selectors", "spam"],
            "there is no selector spam; there are cdpruner, dense, divprune",
        ),
        (["--model", "bundled", "--keep", "0.01"], "is less than sparsevlm can hold with any target layers"),
    ],
)
def test_what_is_refused_before_anything_runs(given, message, capsys, tmp_path):
    assert main([*given, "--table", "spec", "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_lmms_eval_the_pip_line_is_named(capsys, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    assert main(["--model", "bundled", "--table", "spec", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'lmms-eval==0.7.3'" in capsys.readouterr().err


def test_processors_that_make_another_number_of_tokens_are_refused(monkeypatch, tmp_path):
    def no_bounds(processor):
        raise NotImplementedError

    monkeypatch.setattr(checks, "token_side", no_bounds)
    monkeypatch.setattr(checks, "load_skeleton", lambda folder: None)
    monkeypatch.setattr(checks, "load_processor", lambda folder: object())
    monkeypatch.setattr(checks, "adapter_for", lambda model: type("Adapter", (), {"n_layers": 32}))
    monkeypatch.setattr(checks, "VisualCounter", lambda adapter, processor: lambda sizes: 576)
    found = checks.describe_checkpoint("llava-hf/llava-1.5-7b-hf", tmp_path, TABLES["paper"])
    assert (found.n_layers, found.sizes_images) == (32, False)
    with pytest.raises(ValueError, match="for images of 256 visual tokens, and object makes 576 that cannot be chosen"):
        checks.describe_checkpoint("llava-hf/llava-1.5-7b-hf", tmp_path, TABLES["spec"])
