"""Figures of whole calls in the sentences of a document: all of one commit and one device."""

from __future__ import annotations

import re
from collections.abc import Collection

from benchmark.e2e_rows import StoredRow, metric_of

COMPARED = ("hf-dense", "ours-dense", "ours")  # what a run of a case must hold for its figures to be shown

Run = dict[str, list[StoredRow]]  # rows by time stamp: those of a case in one run have the same


def measured_together(rows: list[StoredRow], cases: Collection[str]) -> list[StoredRow]:
    """Selects the rows that a document's figures are read from.

    These are of the newest commit at which every case has a run with all of ``COMPARED``, and of each case the last
    such run.

    Parameters
    ----------
    rows : list of dict
        Of one model.
    cases : collection of str
        Those that the figures name.

    Raises
    ------
    ValueError
        If there is no such commit, with what each lacks, or if the runs at it were measured on several devices.
    """
    by_commit: dict[str, dict[str, Run]] = {}
    for row in sorted(rows, key=lambda row: row["timestamp"], reverse=True):
        if row["case"] in cases:
            of_case = by_commit.setdefault(row["commit"], {}).setdefault(row["case"], {})
            of_case.setdefault(row["timestamp"], []).append(row)
    lacking = []
    for commit, by_case in by_commit.items():  # the newest first
        runs = {case: next(filter(_is_complete, by_case.get(case, {}).values()), []) for case in sorted(cases)}
        if all(runs.values()):
            devices = {case: {row["gpu"] for row in run} for case, run in runs.items()}
            if len(set().union(*devices.values())) > 1:
                shown = "; ".join(f"{case}: {', '.join(sorted(names))}" for case, names in devices.items())
                raise ValueError(
                    f"figures of one document were measured at {commit} on several devices ({shown}): measure all "
                    "cases again on one of them"
                )
            return [row for run in runs.values() for row in run]
        lacking.append(f"{commit}: {'; '.join(_missing(case, by_case) for case in runs if not runs[case])}")
    raise ValueError(
        f"no commit has {', '.join(COMPARED)} in one run of each of {', '.join(sorted(cases))}: measure them at one "
        f"commit. What is missing: {' | '.join(lacking) or 'all rows'}"
    )


def _is_complete(run: list[StoredRow]) -> bool:
    return set(COMPARED) <= {row["provider"] for row in run}


def _missing(case: str, by_case: dict[str, Run]) -> str:
    runs = by_case.get(case)
    if not runs:
        return f"{case} has no rows"
    found = {row["provider"] for row in next(iter(runs.values()))}
    return f"the last run of {case} has no {', '.join(name for name in COMPARED if name not in found)}"


def milliseconds(rows: list[StoredRow]) -> str:
    """Formats one median in milliseconds, of requests of mixed shapes the mean.

    Raises
    ------
    ValueError
        If there is another number of rows of time than one.
    """
    found = _of_time(rows)
    if len(found) != 1:
        raise ValueError(f"a figure needs one stored row, its filter finds {len(found)}")
    return f"{float(found[0]['p50']):.0f}"


def times_faster(rows: list[StoredRow], filter_text: str) -> str:
    """Formats how many times faster one of two providers is: the time of the first that a filter names, by the other's.

    Raises
    ------
    ValueError
        If the filter does not name two providers with one row of time each, or names a case of mixed shapes, in which
        providers may have answered unlike requests.
    """
    names = (re.findall(r"\bprovider=(\S+)", filter_text) or [""])[0].split(",")
    found = [[row for row in _of_time(rows) if row["provider"] == name] for name in names]
    if len(names) != 2 or any(len(of_provider) != 1 or _is_mixed(of_provider[0]) for of_provider in found):
        raise ValueError(
            f"a ratio needs two providers with one stored row each, of equal requests; its filter finds "
            f"{', '.join(f'{len(one)} of {name!r}' for name, one in zip(names, found, strict=True))}"
        )
    return f"{float(found[0][0]['p50']) / float(found[1][0]['p50']):.1f}"


def device(rows: list[StoredRow]) -> str:
    """Names the device that rows were measured on.

    Raises
    ------
    ValueError
        If there is none, or are several.
    """
    names = sorted({row["gpu"] for row in rows})
    if len(names) != 1:
        raise ValueError(f"rows of one device were expected, the filter finds those of {names}")
    return names[0]


def _of_time(rows: list[StoredRow]) -> list[StoredRow]:
    return [row for row in rows if row["metric"] == metric_of(row["case"])]


def _is_mixed(row: StoredRow) -> bool:
    return row["metric"] != "ms"
