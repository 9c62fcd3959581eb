"""From predictions to figures: one result per setting and task, and one per setting for the average of the tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..execution.predictions import Prediction, Stored
from ..metrics.bootstrap import retained
from ..settings import AVERAGE, DENSE, Setting, keep_text

_Place = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """One setting on one task, or on the average of all tasks.

    Attributes
    ----------
    task, selector, keep, seed : str
        ``seed`` is empty where nothing is drawn, and names all seeds (``"0+1+2"``) where their scores are averaged
        row by row.
    n : int
        Rows that both this setting and dense answered.
    n_failed : int
        Rows left out, because one of the two has no answer to them.
    score, dense_score : float
        Means over the same rows.
    retained, ci_low, ci_high : float
        Percent of the dense score with its 95 % interval; ``nan`` where there is none.
    n_visual, avg_tokens : float
        Visual tokens in the prompt, and averaged over the decoder layers' inputs.
    tflops, latency_ms : float
        Mean over rows, and median.
    mean_iou : float
        ``nan`` for tasks without boxes.
    path : str
        Which implementation ran.
    """

    task: str
    selector: str
    keep: str
    seed: str
    n: int
    n_failed: int
    score: float
    dense_score: float
    retained: float
    ci_low: float
    ci_high: float
    n_visual: float
    avg_tokens: float
    tflops: float
    latency_ms: float
    mean_iou: float
    path: str


@dataclass(frozen=True)
class _Column:
    """One side of a comparison with dense: a setting, or the mean over its seeds."""

    selector: str
    keep: str
    seed: str
    settings: tuple[str, ...]


def make_results(settings: Sequence[Setting], tasks: Sequence[str], stored: Stored) -> list[Result]:
    """Compare every setting with dense over the rows that both answered.

    Parameters
    ----------
    settings : sequence of Setting
    tasks : sequence of str
        Both in the order in which they are to be shown.
    stored : dict
        Of :meth:`~sparsevlm.evaluation.execution.predictions.PredictionStore.read`.
    """
    dense = stored.get(DENSE, {})
    answered = {task for (task, _), one in dense.items() if "score" in one}
    results = []
    for column in _columns(settings):
        found = [stored.get(name, {}) for name in column.settings]
        pairs = {task: _Pairs(task, dense, found) for task in tasks}
        results += [_result(column, task, pairs[task], _retained(column, {task: pairs[task]})) for task in tasks]
        if len(tasks) > 1:
            average = _average(column, results[-len(tasks) :], _retained(column, pairs))
            is_whole = all(pairs[task].predictions for task in tasks if task in answered)
            results.append(average if is_whole else without_figures(average))
    return results


def failures(stored: Stored) -> dict[_Place, str]:
    """Lists failures by row, in the order in which the rows were met; settings with the same failure once."""
    found: dict[_Place, list[str]] = {}
    for predictions in stored.values():
        for place, prediction in predictions.items():
            if "error" in prediction:
                said = found.setdefault(place, [])
                said += [text for text in [prediction["error"]] if text not in said]
    return {place: "; ".join(said) for place, said in found.items()}


def without_figures(result: Result) -> Result:
    """An average that would cover fewer tasks than that of dense: nothing of it can be compared."""
    nothing: dict[str, Any] = {name: math.nan for name, value in vars(result).items() if isinstance(value, float)}
    return replace(result, **nothing)


def not_averaged(results: Sequence[Result]) -> list[str]:
    """One sentence for each setting whose average :func:`without_figures` took away."""
    answered = {one.task for one in results if one.selector == DENSE and one.n}
    lost: dict[tuple[str, str, str], list[str]] = {}
    for one in results:
        if one.n == 0 and one.task in answered:
            lost.setdefault((one.selector, one.keep, one.seed), []).append(one.task)
    return [
        f"no average: {selector} at keep {keep}{f', seed {seed}' if seed else ''} has no score on a single row of "
        f"{', '.join(lost[selector, keep, seed])}"
        for selector, keep, seed in lost
        if any(one.task == AVERAGE for one in results)
    ]


def left_out(unsupported: Mapping[str, str]) -> list[str]:
    """One sentence for each reason why the model cannot run some settings."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in unsupported.items():
        by_reason.setdefault(reason, []).append(name)
    return [f"left out: {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _columns(settings: Sequence[Setting]) -> list[_Column]:
    """One per setting, and one for all seeds of a selector and budget behind the last of them."""
    columns = []
    by_budget: dict[tuple[str, str], list[Setting]] = {}
    for setting in settings:
        keep = keep_text(setting.keep)
        columns.append(
            _Column(setting.selector, keep, "" if setting.seed is None else str(setting.seed), (setting.name,))
        )
        by_budget.setdefault((setting.selector, keep), []).append(setting)
    for (selector, keep), group in by_budget.items():
        if len(group) > 1:
            place = columns.index(_Column(selector, keep, str(group[-1].seed), (group[-1].name,)))
            seeds = "+".join(str(setting.seed) for setting in group)
            columns.insert(place + 1, _Column(selector, keep, seeds, tuple(setting.name for setting in group)))
    return columns


class _Pairs:
    """Predictions of a task's rows that dense and every given setting answered."""

    def __init__(self, task: str, dense: dict[_Place, Prediction], found: list[dict[_Place, Prediction]]) -> None:
        # In an order of their own, as the bootstrap depends on it, and several workers write in no fixed one.
        rows = sorted((place for place in dense if place[0] == task), key=lambda place: (len(place[1]), place[1]))
        answered = [place for place in rows if all("score" in one.get(place, {}) for one in (dense, *found))]
        self.n_failed = len(rows) - len(answered)
        self.predictions = [[one[place] for one in found] for place in answered]
        self.dense = np.array([dense[place]["score"] for place in answered], dtype=np.float64)
        self.scores = np.array([fmean(one["score"] for one in row) for row in self.predictions], dtype=np.float64)

    def figures(self, name: str) -> list[float]:
        """A figure of every prediction that has it."""
        return [one[name] for row in self.predictions for one in row if name in one]

    def pair(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scores of the setting and of dense, row by row."""
        return self.scores, self.dense


def _retained(column: _Column, pairs: dict[str, _Pairs]) -> tuple[float, float, float]:
    found = retained({task: one.pair() for task, one in pairs.items()})
    # Dense against itself has no uncertainty worth an interval.
    return (found.value, math.nan, math.nan) if column.selector == DENSE else (found.value, found.low, found.high)


def _result(column: _Column, task: str, pairs: _Pairs, kept: tuple[float, float, float]) -> Result:
    def of(figures: list[float], statistic: Callable[[list[float]], float] = fmean) -> float:
        return float(statistic(figures)) if figures else math.nan

    return Result(
        task=task,
        selector=column.selector,
        keep=column.keep,
        seed=column.seed,
        n=len(pairs.predictions),
        n_failed=pairs.n_failed,
        score=of(pairs.scores.tolist()),
        dense_score=of(pairs.dense.tolist()),
        retained=kept[0],
        ci_low=kept[1],
        ci_high=kept[2],
        n_visual=of(pairs.figures("n_visual")),
        avg_tokens=of(pairs.figures("avg_tokens")),
        tflops=of(pairs.figures("tflops")),
        latency_ms=of(pairs.figures("ms"), median),
        mean_iou=of(pairs.figures("iou")),
        path="+".join(sorted({one["path"] for row in pairs.predictions for one in row})),
    )


def _average(column: _Column, tasks: Sequence[Result], kept: tuple[float, float, float]) -> Result:
    """Every task counts the same, however many rows it has."""

    def mean(name: str) -> float:
        values = [value for one in tasks if not math.isnan(value := getattr(one, name))]
        return fmean(values) if values else math.nan

    return Result(
        task=AVERAGE,
        selector=column.selector,
        keep=column.keep,
        seed=column.seed,
        n=sum(one.n for one in tasks),
        n_failed=sum(one.n_failed for one in tasks),
        score=mean("score"),
        dense_score=mean("dense_score"),
        retained=kept[0],
        ci_low=kept[1],
        ci_high=kept[2],
        n_visual=mean("n_visual"),
        avg_tokens=mean("avg_tokens"),
        tflops=mean("tflops"),
        latency_ms=mean("latency_ms"),
        mean_iou=mean("mean_iou"),
        path="+".join(sorted({one.path for one in tasks})),
    )
