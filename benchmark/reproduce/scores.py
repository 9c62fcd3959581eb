"""One score for each task, and what is retained of it, with intervals of a paired bootstrap over what tasks average.

lmms-eval's scores stand as they are. For the interval they are computed again from the rows: as the mean of the rows,
as MME's sum of categories over pairs of questions, or as POPE's F1. Where that is not lmms-eval's score, there is no
interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevlm.evaluation.metrics.bootstrap import LEVEL, N_RESAMPLES, Retained, resamples

Rows = Sequence[Mapping[str, Any]]
Array = NDArray[np.float64]

_MME = ("mme_perception_score", "mme_cognition_score")
_F1 = "pope_f1_score"
# Metrics that are a task's score, the first that it has; the two of MME are added.
HEADLINES: tuple[tuple[str, ...], ...] = (
    _MME,
    (_F1,),
    ("relaxed_overall",),
    ("anls",),
    ("gpt_eval_score",),
    ("exact_match",),
)
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Units:
    """What is drawn with replacement in the place of a task's rows.

    Attributes
    ----------
    strata : dict of str to ndarray
        Values by group, each of shape (n_units, n_columns); units are drawn within their group.
    is_f1 : bool
        The columns are true positives, false positives and false negatives; otherwise there is one, and the score is
        the sum over the groups of their means.
    """

    strata: dict[str, Array]
    is_f1: bool = False

    def score(self, weights: Mapping[str, NDArray[Any]]) -> Array:
        """Scores by draw, of weights of shape (n_draws, n_units) for each group."""
        sums = {name: weights[name] @ values for name, values in self.strata.items()}
        if not self.is_f1:
            return np.sum([sums[name][:, 0] / len(self.strata[name]) for name in sums], axis=0)
        (counts,) = sums.values()
        right, wrong = 2 * counts[:, 0], counts[:, 1] + counts[:, 2]
        return np.divide(right, right + wrong, out=np.zeros_like(right), where=right + wrong > 0)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units by group."""
        return {name: len(values) for name, values in self.strata.items()}

    def plain_score(self) -> float:
        """The score of all units."""
        return float(self.score({name: np.ones((1, len(values))) for name, values in self.strata.items()})[0])


def headline(metrics: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the metrics that are a task's score.

    Raises
    ------
    ValueError
        If there are several and none is known.
    """
    for names in HEADLINES:
        if found := tuple(name for name in names if name in metrics):
            return found
    if len(metrics) == 1:
        return tuple(metrics)
    raise ValueError(
        f"none of the metrics {', '.join(metrics)} is known as the score of a task; leave the others out of its file."
    )


def task_score(metrics: Mapping[str, float]) -> float:
    """The score of a task; of MME perception plus cognition."""
    return sum(metrics[name] for name in headline(metrics))


def units_of(names: Sequence[str], rows: Rows) -> Units | None:
    """What a task's score is made of, row by row; ``None`` where its rows have no numbers."""
    if set(names) <= set(_MME):
        return _pairs(rows)
    (name,) = names
    values = [row["scores"].get(name) for row in rows]
    if name == _F1:
        return _positives(values)
    values = [value.get("score") if isinstance(value, dict) else value for value in values]
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None
    return Units({"": np.array(values, dtype=float)[:, None]})


def _pairs(rows: Rows) -> Units:
    """MME: of both questions about an image the part that is right, and once more if that is all, in percent."""
    pairs: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for value in row["scores"].values():
            pairs.setdefault(value["category"], {}).setdefault(str(value["question_id"]), []).append(value["score"])
    strata = {}
    for category, questions in sorted(pairs.items()):
        values = [100 * np.mean(scores) + 100 * float(min(scores) == 1) for _, scores in sorted(questions.items())]
        strata[category] = np.array(values, dtype=float)[:, None]
    return Units(strata)


def _positives(values: Sequence[Any]) -> Units:
    said = np.array([value["prediction"] == "yes" for value in values])
    denied = np.array([value["prediction"] == "no" for value in values])
    right = np.array([value["ground_truth"] == "yes" for value in values])
    return Units({"": np.stack([said & right, said & ~right, denied & right], axis=1).astype(float)}, is_f1=True)


def paired(names: Sequence[str], pruned: tuple[float, Rows], dense: tuple[float, Rows]) -> tuple[Units, Units] | None:
    """Units of the same rows under two settings, of each lmms-eval's score and its rows; ``None`` where the rows do not
    give the score."""
    both = [units_of(names, sorted(rows, key=lambda row: str(row["id"]))) for _, rows in (pruned, dense)]
    first, second = both
    if first is None or second is None or first.sizes != second.sizes:
        return None
    whole = second.plain_score()
    if not whole or not dense[0]:
        return None
    factor = dense[0] / whole  # of percent, or one
    is_same = math.isclose(pruned[0], factor * first.plain_score(), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return (first, second) if is_same else None


def retained_with_interval(values: Mapping[str, float], units: Mapping[str, tuple[Units, Units] | None]) -> Retained:
    """Mean over tasks of what is retained, with the percentile interval of draws within each task and group.

    Parameters
    ----------
    values : mapping of str to float
        Percent of the dense score by task.
    units : mapping of str to (pruned, dense) or None
        Where one is ``None``, or holds a single unit, there is no interval.
    """
    value = float(np.mean(list(values.values()))) if values else math.nan
    draws = []
    for task in values:
        pair = units.get(task)
        if pair is None or max(pair[1].sizes.values()) < 2:
            return Retained(value, math.nan, math.nan)
        weights = {name: resamples(f"{task}/{name}", size) for name, size in pair[1].sizes.items()}
        pruned, dense = (one.score(weights) for one in pair)
        draws.append(np.divide(100 * pruned, dense, out=np.full(N_RESAMPLES, np.nan), where=dense > 0))
    if not draws:
        return Retained(value, math.nan, math.nan)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(np.mean(draws, axis=0), [tail, 100 - tail])
    return Retained(value, float(low), float(high))
