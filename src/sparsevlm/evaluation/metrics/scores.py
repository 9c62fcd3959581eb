"""Scores of one answer, each in [0, 1]."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

from .vqa import LEAST_ANSWERS, vqa_accuracy

IOU_THRESHOLD = 0.5
_RELAXED = 0.05
_ROUNDING = 1e-9  # so that 21 is within 5 % of 20
_Box = tuple[int, int, int, int]


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, up to case, runs of white space and a full stop at the end."""
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if a number is within 5 % of an answer, or any other text equal to it as by :func:`exact_match`.

    Source: Methani et al., "PlotQA", WACV 2020, and Masry et al., "ChartQA", ACL Findings 2022. A per cent sign, a
    dollar sign and commas between thousands are left out of account; an answer that is a year is a number as well,
    which is as the sources have it, so give ``exact`` for those.
    """
    said = _number(prediction)
    for answer in answers:
        wanted = _number(answer)
        if wanted is not None and said is not None and abs(said - wanted) <= _RELAXED * abs(wanted) + _ROUNDING:
            return 1.0
    return exact_match(prediction, answers)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, 0 below one half, by the package ``anls-star``.

    Source: Biten et al., "Scene Text Visual Question Answering", ICCV 2019, equation 1. A similarity of exactly
    one half counts, as in that package; the equation, read to the letter, has 0 for it.
    """
    from anls_star import anls_score

    similarity: Any = anls_score(tuple(answers), prediction)
    return float(similarity)


def box_iou(prediction: str, answers: Sequence[str]) -> float:
    """Intersection over union with the best answer; 0 where a text does not hold exactly four whole numbers."""
    box = _box(prediction)
    return 0.0 if box is None else max(_iou(box, other) for other in map(_box, answers) if other is not None)


def box_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the boxes (left, top, right, bottom) overlap by an IoU of at least one half."""
    return float(box_iou(prediction, answers) >= IOU_THRESHOLD)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
    "iou": box_match,
}


def score(metric: str, prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """The score of a prediction, and what is stored beside it (``iou`` for boxes)."""
    scores = {"score": METRICS[metric](prediction, answers)}
    if metric == "iou":
        scores["iou"] = box_iou(prediction, answers)
    return scores


def check_metric(metric: str) -> None:
    """Refuse a metric that does not exist or cannot be computed here.

    Raises
    ------
    ValueError
        If there is no such metric.
    ModuleNotFoundError
        If its package is missing; the message has the pip line.
    """
    if metric not in METRICS:
        raise ValueError(f"there is no metric {metric!r}; there are {', '.join(METRICS)}")
    if metric == "anls" and importlib.util.find_spec("anls_star") is None:
        raise ModuleNotFoundError(
            "the metric anls needs anls-star: pip install 'anls-star>=1.0' (part of the extra eval)."
        )


def check_answers(metric: str, answers: Sequence[str]) -> None:
    """Refuse answers that a metric cannot judge by.

    Raises
    ------
    ValueError
        If the metric does not exist or the answers do not fit it, with the remedy.
    """
    check_metric(metric)
    if metric == "vqa" and len(answers) < LEAST_ANSWERS:
        raise ValueError(
            f"the metric vqa needs the answers of at least {LEAST_ANSWERS} annotators, got {len(answers)}; use exact"
        )
    if metric == "iou" and any(_box(answer) is None for answer in answers):
        raise ValueError("the metric iou needs four whole numbers (left, top, right, bottom) in every answer")


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().removesuffix(".")


def _number(text: str) -> float | None:
    plain = text.strip().removesuffix(".").strip("%$ ").replace(",", "")
    return float(plain) if re.fullmatch(r"-?\d+(\.\d+)?", plain) else None


def _box(text: str) -> _Box | None:
    numbers = [int(digits) for digits in re.findall(r"(?<!\d)-\d+|\d+", text)]  # in "10-20" no minus, but a dash
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def _iou(one: _Box, other: _Box) -> float:
    def area(left: int, top: int, right: int, bottom: int) -> int:
        return max(0, right - left) * max(0, bottom - top)

    shared = area(max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3]))
    union = area(*one) + area(*other) - shared
    return shared / union if union else 0.0
