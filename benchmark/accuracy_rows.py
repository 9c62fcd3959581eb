"""Rows of ``results/accuracy.csv``: those of one measurement of a whole model, and means over its suites."""

from __future__ import annotations

from benchmark.accuracy_runs import SUITES
from benchmark.e2e_rows import StoredRow
from sparsevlm.evaluation.settings import AVERAGE, DENSE

Cell = tuple[str, str, str, str, str]  # selector, keep, target layers, other options and seed
LEAST_N = 200  # questions of a cell; rows with fewer are of no table over kinds of tasks
_CONDITIONS = ("weights", "dtype", "device", "torch", "transformers")  # what all rows of a model share
# Runs of one suite in half precision differ on a GPU by an answer that is nearly tied, seldom two.
_DENSE_APART = 0.01


def of_suites(rows: list[StoredRow]) -> dict[Cell, dict[str, StoredRow]]:
    """Selects the suites' averages of one model, all measured at one commit, on :data:`LEAST_N` questions or more.

    Parameters
    ----------
    rows : list of dict
        Of one model; the suites are those that it answers about and that have rows.

    Returns
    -------
    dict
        By setting the row of each suite, suites in the order of :data:`~benchmark.accuracy_runs.SUITES`. Of several
        commits at which every suite was run it is the newest, and of several runs of a setting there the last; a
        setting that a suite lacks is left out. Dense is one setting, whatever options its run had.

    Raises
    ------
    ValueError
        If the rows are of several models, no commit has all suites, or what was measured differs between runs.
    """
    models = {row["model"] for row in rows}
    if len(models) != 1:
        raise ValueError(f"a table over kinds of tasks is of one model, its filter finds {sorted(models)}")
    (known,) = (SUITES[model] for model in models)
    rows = [row for row in rows if row["task"] == AVERAGE and row["suite"] in known and int(row["n"]) >= LEAST_N]
    suites = [suite for suite in known if any(row["suite"] == suite for row in rows)]
    commits = dict.fromkeys(row["commit"] for row in sorted(rows, key=lambda row: row["timestamp"], reverse=True))
    for commit in commits:
        found = [row for row in rows if row["commit"] == commit]
        if {row["suite"] for row in found} == set(suites):
            _check_same(found)
            return _by_setting(found, suites)
    raise ValueError(
        f"no commit has rows of {LEAST_N} questions or more of all of {', '.join(suites or known)}: "
        "python -m benchmark.accuracy_runs"
    )


def _check_same(rows: list[StoredRow]) -> None:
    first = rows[0]
    of_suite: dict[str, StoredRow] = {}
    for row in rows:
        like = of_suite.setdefault(row["suite"], row)
        differing = [name for name in _CONDITIONS if row[name] != first[name]]
        differing += ["data"] if row["data"] != like["data"] else []
        apart = abs(float(row["dense_score"]) - float(like["dense_score"]))
        differing += ["dense_score"] if apart > _DENSE_APART else []
        if differing:
            raise ValueError(
                f"runs {first['run']}, {like['run']} and {row['run']} at {row['commit']} differ in "
                f"{', '.join(dict.fromkeys(differing))}: take out the rows of those that no table is to show"
            )


def _by_setting(rows: list[StoredRow], suites: list[str]) -> dict[Cell, dict[str, StoredRow]]:
    by_setting: dict[Cell, dict[str, StoredRow]] = {}
    for row in sorted(rows, key=lambda row: (suites.index(row["suite"]), row["timestamp"])):
        changed = (
            ("default", "", "") if row["selector"] == DENSE else (row["target_layers"], row["options"], row["seed"])
        )
        setting = (row["selector"], row["keep"], *changed)
        by_setting.setdefault(setting, {})[row["suite"]] = row
    return {setting: found for setting, found in by_setting.items() if len(found) == len(suites)}


def mean_retained(by_suite: dict[str, StoredRow]) -> float:
    """Computes the mean over the suites of the retained percent."""
    return sum(float(row["retained"]) for row in by_suite.values()) / len(by_suite)


def interval_of_mean(by_suite: dict[str, StoredRow]) -> tuple[float, float]:
    """Computes the 95 % interval of :func:`mean_retained` from those of the suites, which were drawn apart."""
    mean = mean_retained(by_suite)
    half_widths = [(float(row["ci_high"]) - float(row["ci_low"])) / 2 for row in by_suite.values()]
    half = sum(width**2 for width in half_widths) ** 0.5 / len(half_widths)
    return mean - half, mean + half
