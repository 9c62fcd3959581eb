"""Scores of one answer, worked by hand."""

import pytest

from sparsevlm.evaluation.metrics.scores import (
    METRICS,
    anls,
    box_iou,
    check_answers,
    exact_match,
    relaxed_accuracy,
    score,
)
from sparsevlm.evaluation.metrics.vqa import normalised, vqa_accuracy


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("125", ["125"], 1),
        ("  Red  CAP, blue 702.", ["red cap, blue 702"], 1),
        ("125", ["126", "125"], 1),
        ("12", ["125"], 0),
        ("", ["125"], 0),
        ("125..", ["125"], 0),
        ("Straße", ["STRASSE"], 1),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two Dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("mid-air", "mid air"),
        ("yes, it is", "yes it is"),
        ("3.5 m", "3.5 m"),
        ("u.s.", "us"),
        ("none", "0"),
        ("a\tcat\nand  an owl", "cat and owl"),
        ("(left)", "left"),
        ("", ""),
    ],
)
def test_normalisation_of_the_vqa_challenge(text, expected):
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("n_matching", "expected"),
    # Of ten annotators k agree: (k · min(1, (k − 1) / 3) + (10 − k) · min(1, k / 3)) / 10.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_one_annotator_out(n_matching, expected):
    answers = ["a red car"] * n_matching + [f"other {i}" for i in range(10 - n_matching)]
    assert vqa_accuracy("Red car.", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("21", "20", 1),
        ("21.1", "20", 0),
        ("19", "20", 1),
        ("18.9", "20", 0),
        ("-20", "20", 0),
        ("1,940", "2000", 1),
        ("$9.40", "9.4", 1),
        ("12%", "12", 1),
        ("12.", "12", 1),
        ("0", "0", 1),
        ("0.1", "0", 0),
        ("about 20", "20", 0),
        ("Blue", "blue", 1),
        ("blau", "blue", 0),
        ("", "5", 0),
    ],
)
def test_relaxed_accuracy(prediction, answer, expected):
    assert relaxed_accuracy(prediction, [answer]) == expected
    assert relaxed_accuracy(prediction, ["nothing", answer]) == expected


def test_anls():
    pytest.importorskip("anls_star")
    assert anls("Hello World", ["hello world"]) == 1
    assert anls("hello wrld", ["hello world", "something else"]) == pytest.approx(1 - 1 / 11)
    assert anls("abcd", ["abxy"]) == 0.5
    assert anls("abc", ["xyz"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("00,00,10,10", "00,00,10,10", 1.0),
        ("0 0 10 10", "[5, 0, 15, 10]", 50 / 150),
        ("box: 0 0 10 5", "0 0 10 10", 0.5),
        ("-10 0 10 10", "0 0 10 10", 0.5),
        ("[-5,-5,5,5]", "-5 -5 5 5", 1.0),
        ("0-0-10-10", "0 0 10 10", 1.0),
        ("0 0 10", "0 0 10 10", 0.0),
        ("0 0 10 10 3", "0 0 10 10", 0.0),
        ("10 10 0 0", "0 0 10 10", 0.0),
        ("3 3 3 3", "3 3 3 3", 0.0),
        ("20 20 30 30", "0 0 10 10", 0.0),
        ("nothing", "0 0 10 10", 0.0),
    ],
)
def test_box(prediction, answer, expected):
    assert box_iou(prediction, [answer]) == pytest.approx(expected)
    stored = score("iou", prediction, [answer])
    assert stored == {"score": float(expected >= 0.5), "iou": pytest.approx(expected)}


def test_the_best_box_counts():
    assert box_iou("0 0 10 10", ["50 50 60 60", "0 0 10 10"]) == 1


@pytest.mark.parametrize(
    ("metric", "answers", "message"),
    [
        ("bleu", ["a"], "there is no metric 'bleu'; there are exact, vqa, anls, relaxed, iou"),
        ("vqa", ["a", "b", "c"], "at least 4 annotators, got 3; use exact"),
        ("iou", ["left half"], "four whole numbers"),
    ],
)
def test_answers_that_a_metric_cannot_judge_by(metric, answers, message):
    with pytest.raises(ValueError, match="metric") as caught:
        check_answers(metric, answers)
    assert message in str(caught.value)


def test_a_missing_package_is_named_with_its_pip_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'anls-star"):
        check_answers("anls", ["a"])


def test_every_metric_is_a_share():
    pytest.importorskip("anls_star")
    answers = ["1 2 3 4"] * 4
    for metric in METRICS:
        check_answers(metric, answers)
        assert score(metric, "1 2 3 4", answers)["score"] == 1
        assert score(metric, "completely other", answers)["score"] == 0
