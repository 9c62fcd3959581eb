"""What lmms-eval returns, in our table; the run itself is tested where lmms-eval is installed."""

import json
import math
import sys

import pytest

from sparsevlm.evaluation import DENSE, EvalConfig, Setting, make_settings
from sparsevlm.evaluation.execution.lmms import model_arguments, read_lmms
from sparsevlm.evaluation.execution.resolved_model import ResolvedModel
from sparsevlm.evaluation.reporting.lmms_results import lmms_results
from sparsevlm.evaluation.reporting.results import not_averaged
from sparsevlm.evaluation.settings import AVERAGE
from sparsevlm.evaluation.suites.registry import lmms_suite
from sparsevlm.report_total import Cost, ReportTotal

OURS = Setting("ours", 0.5)


def found(exact, f1):
    """One task whose score is the percentage of its rows', and one that is no mean of them."""
    samples = [
        {"doc_id": i, "target": "yes", "filtered_resps": ["Yes"], "exact_match": hit} for i, hit in enumerate(exact)
    ]
    pairs = [{"doc_id": i, "target": "no", "filtered_resps": ["no"], "f1": {"pair": [1, 0]}} for i in range(2)]
    return {
        "results": {
            "vqa": {
                "alias": "vqa",
                "exact_match,none": 100 * sum(exact) / len(exact),
                "exact_match_stderr,none": 0.1,
                "wer,none": 0.3,
                "note,none": "N/A",
            },
            "pope": {"alias": "pope", "f1,none": f1, "f1_stderr,none": "N/A"},
        },
        "higher_is_better": {"vqa": {"exact_match": True, "wer": False}, "pope": {"f1": True}},
        "samples": {"vqa": samples, "pope": pairs},
    }


def counted(average_in, sparse):
    """What the plugin sums up over four requests of 100 visual tokens."""
    flops = Cost(8e12 if sparse else 0.0, sparse)
    return ReportTotal(2, 4, 400, average_in * 4.0, 0.0, flops, Cost(0.0, 0.0), {}, 0, 0, 0)


def store(folder, setting, result, total):
    figures, predictions = read_lmms(result, {"vqa": total}, setting)
    (folder / f"{setting.name}.scores.json").write_text(json.dumps(figures))
    (folder / f"{setting.name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in predictions))
    return figures, predictions


def test_scores_are_those_of_lmms_eval(tmp_path):
    figures, predictions = store(tmp_path, Setting(DENSE), found([1, 1, 1, 0], 0.8), counted(100, 0.0))
    assert figures == {
        "vqa": {"score": 75, "n": 4, "n_visual": 100, "avg_tokens": 100},
        "pope": {"score": 0.8, "n": 2},
    }
    assert predictions[0] == {
        "id": "0",
        "task": "vqa",
        "setting": "dense",
        "prediction": "Yes",
        "answers": ["yes"],
        "score": 1.0,
    }
    assert "score" not in predictions[-1]
    store(tmp_path, OURS, found([1, 0, 1, 0], 0.6), counted(50, 4e12))
    results = lmms_results([Setting(DENSE), OURS], tmp_path)
    assert [one.task for one in results] == ["vqa", "pope", AVERAGE] * 2
    assert (results[0].avg_tokens, results[0].tflops) == (100, 2)
    vqa, pope, average = results[3:]
    assert (vqa.n_visual, vqa.avg_tokens, vqa.tflops) == (100, 50, 1)
    assert (average.avg_tokens, average.tflops) == (50, 1), "what is known of it"
    assert (vqa.score, vqa.dense_score, vqa.n) == (50, 75, 4)
    assert vqa.retained == pytest.approx(100 * 2 / 3)
    assert vqa.ci_low < vqa.retained < vqa.ci_high
    assert pope.retained == pytest.approx(75)
    assert math.isnan(pope.ci_low), "F1 is no mean over rows"
    assert average.retained == pytest.approx((100 * 2 / 3 + 75) / 2)
    assert math.isnan(average.ci_low)
    assert math.isnan(average.score)


def test_several_metrics_are_several_rows():
    result = found([1, 0], 0.5)
    result["higher_is_better"]["vqa"]["wer"] = True
    figures, predictions = read_lmms(result, {}, OURS)
    assert list(figures) == ["vqa:exact_match", "vqa:wer", "pope"]
    assert [one.get("score") for one in predictions if one["task"] == "vqa:wer"] == [None, None]


def test_a_number_that_lmms_eval_does_not_have_leaves_no_average(tmp_path):
    store(tmp_path, Setting(DENSE), found([1, 1], 0.8), counted(100, 0.0))
    store(tmp_path, OURS, found([1, 0], math.nan), counted(50, 4e12))
    results = lmms_results([Setting(DENSE), OURS], tmp_path)
    vqa, pope, average = results[3:]
    assert (vqa.retained, pope.n, average.task) == (50, 0, AVERAGE)
    assert math.isnan(pope.retained)
    assert math.isnan(average.retained)
    assert not_averaged(results) == ["no average: ours at keep 0.5 has no score on a single row of pope"]


def test_the_plugin_gets_what_the_command_line_says(tmp_path):
    config = EvalConfig(
        "lmms:mme",
        "m",
        ("sparsevlm", "random", "downsample"),
        (0.25,),
        seeds=(3,),
        target_layers=(2, 6),
        options={"tau": 0.3},
    )
    place = ResolvedModel("m", tmp_path, "cpu", "float32")
    dense, ours, random, smaller = make_settings(config)
    common = {
        "pretrained": str(tmp_path),
        "device": "cpu",
        "dtype": "float32",
        "attn_implementation": "sdpa",
        "batch_size": 32,
    }
    assert model_arguments(config, place, dense) == {**common, "keep": 1.0}
    pruning = {"selector": "sparsevlm", "keep": 0.25, "tau": 0.3, "target_layers": [2, 6]}
    assert model_arguments(config, place, ours) == {**common, **pruning}
    assert model_arguments(config, place, random) == {**common, **pruning, "selector": "random", "seed": 3}
    assert model_arguments(config, place, smaller) == {**common, "selector": "downsample", "keep": 0.25}


def test_without_lmms_eval_the_pip_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lmms-eval==0\.7\.3'"):
        lmms_suite(EvalConfig("lmms:mme", "m"))


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("lmms:mme", {"tasks": ("mme",)}, "are named in the suite"),
        ("demo", {"include_path": "x"}, "--include-path is for --suite lmms:TASK only"),
    ],
)
def test_options_of_one_kind_of_suite(suite, options, message):
    with pytest.raises(ValueError, match=message):
        lmms_suite(EvalConfig(suite, "m", **options))
