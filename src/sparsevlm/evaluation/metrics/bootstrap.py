"""Retained part of the dense score, with intervals of a paired bootstrap over rows.

Own code, not ``scipy.stats.bootstrap``: that one resamples no strata, which the average over tasks needs, and draws
anew for every pair, where all settings of a task can share one set of draws.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

N_RESAMPLES = 2000
LEVEL = 0.95
_SEED = 20_260_101


@dataclass(frozen=True)
class Retained:
    """Percent of the dense score, with a confidence interval.

    ``nan`` where the dense score is zero; the interval also where a task has a single row, of which every draw is the
    same.

    Attributes
    ----------
    value, low, high : float
    """

    value: float
    low: float
    high: float


def retained(pairs: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Retained:
    """Mean over tasks of 100 · mean(pruned) / mean(dense), with the percentile interval of a stratified bootstrap.

    Rows are drawn with replacement within each task, a row's two scores together. Seeded: the same scores give the
    same interval.

    Parameters
    ----------
    pairs : mapping of str to (pruned, dense)
        Per task, the scores of the same rows, each of shape (n_rows,). Tasks without rows, or whose dense score is
        zero, have no ratio and do not count.

    Returns
    -------
    Retained
    """
    counted = {task: pair for task, pair in pairs.items() if pair[1].size and pair[1].mean() > 0}
    if not counted:
        return Retained(np.nan, np.nan, np.nan)
    values, draws = [], []
    for task, (pruned, dense) in counted.items():
        values.append(100 * pruned.mean() / dense.mean())
        counts = resamples(task, dense.size)
        sums = counts @ np.stack([pruned, dense], axis=1).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws.append(np.where(sums[:, 1] > 0, 100 * sums[:, 0] / sums[:, 1], np.nan))
    value = float(np.mean(values))
    if any(dense.size < 2 for _, dense in counted.values()):
        return Retained(value, np.nan, np.nan)
    averages = np.mean(draws, axis=0)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(averages, [tail, 100 - tail])
    return Retained(value, float(low), float(high))


@lru_cache(maxsize=32)
def resamples(task: str, n_rows: int) -> NDArray[np.float32]:
    """Draws rows with replacement, task by task: counts of shape (N_RESAMPLES, n_rows)."""
    generator = np.random.default_rng([_SEED, zlib.crc32(task.encode())])
    return generator.multinomial(n_rows, np.full(n_rows, 1 / n_rows), size=N_RESAMPLES).astype(np.float32)
