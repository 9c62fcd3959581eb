"""Results of lmms-eval, compared with its dense run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ..metrics.bootstrap import Retained, retained
from ..settings import AVERAGE, DENSE, Setting, keep_text
from .results import Result, without_figures

# A metric is a mean of its rows' scores up to a factor; other metrics get no interval.
_TOLERANCE = 1e-6


def lmms_results(settings: Sequence[Setting], folder: Path) -> list[Result]:
    """Compare every setting with dense.

    The score is lmms-eval's. An interval needs a score per sample of which the task's is the mean (up to a factor, as
    in percent); other metrics, such as F1, get none, and neither does an average with such a task in it.
    """
    figures = {setting.name: json.loads((folder / f"{setting.name}.scores.json").read_text()) for setting in settings}
    scores = {setting.name: _scores(folder / f"{setting.name}.jsonl") for setting in settings}
    for row, found in figures[DENSE].items():
        known = (figures[setting.name].get(row, {}).get("dense_tflops") for setting in settings)
        found["tflops"] = next((value for value in known if value is not None), math.nan)
    results = []
    for setting in settings:
        found, pairs, rows = figures[setting.name], {}, []
        for row, dense in figures[DENSE].items():
            if row not in found:  # lmms-eval had no number for it
                rows.append(_result(setting, row, {"score": math.nan, "n": 0}, dense["score"], None))
                continue
            pair = (scores[setting.name].get(row, {}), scores[DENSE].get(row, {}))
            pruned, whole = (np.array([one[place] for place in pair[1] if place in pair[0]]) for one in pair)
            is_mean = _is_mean(pruned, found[row]["score"], whole, dense["score"])
            if is_mean:
                pairs[row] = (pruned, whole)
            low_high = retained({row: pairs[row]}) if is_mean and setting.selector != DENSE else None
            rows.append(_result(setting, row, found[row], dense["score"], low_high))
        results += rows
        if len(rows) > 1:
            complete = len(pairs) == len(rows) and setting.selector != DENSE
            average = _average(rows, retained(pairs) if complete else None)
            results.append(average if all(one.n for one in rows) else without_figures(average))
    return results


def _scores(file: Path) -> dict[str, dict[str, float]]:
    """Scores by row of the table and sample."""
    found: dict[str, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        if "score" in one:
            found.setdefault(one["task"], {})[one["id"]] = one["score"]
    return found


def _is_mean(pruned: Any, pruned_score: float, dense: Any, dense_score: float) -> bool:
    """Tells whether both scores are the means of their samples', up to the same factor."""
    if not dense.size or not dense.mean() or not dense_score:
        return False
    factor = dense_score / dense.mean()
    return math.isclose(pruned_score, factor * pruned.mean(), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _result(setting: Setting, row: str, found: dict[str, Any], dense_score: float, interval: Retained | None) -> Result:
    return Result(
        task=row,
        selector=setting.selector,
        keep=keep_text(setting.keep),
        seed="" if setting.seed is None else str(setting.seed),
        n=found["n"],
        n_failed=0,
        score=found["score"],
        dense_score=dense_score,
        retained=100 * found["score"] / dense_score if dense_score else math.nan,
        ci_low=math.nan if interval is None else interval.low,
        ci_high=math.nan if interval is None else interval.high,
        n_visual=found.get("n_visual", math.nan),
        avg_tokens=found.get("avg_tokens", math.nan),
        tflops=found.get("tflops", math.nan),
        latency_ms=math.nan,
        mean_iou=math.nan,
        path="",
    )


def _average(rows: Sequence[Result], interval: Retained | None) -> Result:
    """Every row of the table counts the same. Scores of different scales have no mean: only what is retained has."""

    def mean(name: str) -> float:
        values = [value for one in rows if not math.isnan(value := getattr(one, name))]
        return fmean(values) if values else math.nan

    return replace(
        rows[0],
        task=AVERAGE,
        n=sum(one.n for one in rows),
        score=math.nan,
        dense_score=math.nan,
        retained=mean("retained"),
        ci_low=math.nan if interval is None else interval.low,
        ci_high=math.nan if interval is None else interval.high,
        n_visual=mean("n_visual"),
        avg_tokens=mean("avg_tokens"),
        tflops=mean("tflops"),
    )
