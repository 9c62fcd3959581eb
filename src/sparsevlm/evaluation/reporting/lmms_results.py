"""What lmms-eval found, compared with its dense run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from ...report import ReportTotal
from ..execution.predictions import Prediction
from ..metrics.bootstrap import Retained, retained
from ..settings import DENSE, Setting, keep_text
from .results import AVERAGE, Result, without_figures

# A metric is a mean of its rows' scores up to a factor; other metrics get no interval.
_TOLERANCE = 1e-6


def read_lmms(
    found: dict[str, Any], totals: Mapping[str, ReportTotal], setting: Setting
) -> tuple[dict[str, dict[str, Any]], list[Prediction]]:
    """Scores by task and metric, and one prediction per logged sample and metric.

    A task with several metrics becomes several rows of the table, ``task:metric``. Metrics of which less is better,
    and what is no number, are left out.

    Parameters
    ----------
    found : dict
        What ``simple_evaluate`` returned.
    totals : mapping
        What the model counted, by task.
    setting : Setting

    Returns
    -------
    figures : dict
        Per row of the table: ``score`` as lmms-eval aggregates it, ``n`` samples, and means of what was counted.
    predictions : list of dict
        With a ``score`` where a sample has one number.
    """
    figures: dict[str, dict[str, Any]] = {}
    predictions: list[Prediction] = []
    for task, samples in found["samples"].items():
        better = found.get("higher_is_better", {}).get(task, {})
        metrics = [(name, value) for name, value in _metrics(found["results"][task]) if better.get(name, True)]
        for metric, value in metrics:
            row = task if len(metrics) == 1 else f"{task}:{metric}"
            figures[row] = {"score": value, "n": len(samples), **_counted(totals.get(task))}
            predictions += [_prediction(row, metric, sample, setting) for sample in samples]
    return figures, predictions


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


def _counted(total: ReportTotal | None) -> dict[str, float]:
    """Means per sample; an unpruned run counts no FLOPs."""
    if total is None or not total.n_samples:
        return {}
    counted = {"n_visual": total.visual_tokens / total.n_samples, "avg_tokens": total.average_in}
    if total.flops.dense:
        counted["tflops"] = total.flops.sparse / total.n_samples / 1e12
        counted["dense_tflops"] = total.flops.dense / total.n_samples / 1e12
    return counted


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        metric, comma, _ = name.partition(",")
        if comma and "_stderr" not in metric and isinstance(value, (int, float)) and not math.isnan(value):
            yield metric, float(value)


def _prediction(row: str, metric: str, sample: dict[str, Any], setting: Setting) -> Prediction:
    said = sample["filtered_resps"]
    prediction = {
        "id": str(sample["doc_id"]),
        "task": row,
        "setting": setting.name,
        "prediction": str(said[0] if isinstance(said, list) and len(said) == 1 else said),
        "answers": [str(sample["target"])],
    }
    score = sample.get(metric)
    if isinstance(score, dict):
        score = score.get("score")
    return {**prediction, "score": float(score)} if isinstance(score, (int, float)) else prediction


def _scores(file: Path) -> dict[str, dict[str, float]]:
    """Scores by row of the table and sample."""
    found: dict[str, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        if "score" in one:
            found.setdefault(one["task"], {})[one["id"]] = one["score"]
    return found


def _is_mean(pruned: Any, pruned_score: float, dense: Any, dense_score: float) -> bool:
    """Whether both scores are the means of their samples', up to the same factor."""
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
