"""Results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..settings import AVERAGE
from .results import Result

_MAX_NAMED = 20
_SUMMARY = (
    "selector",
    "keep",
    "seed",
    "tokens",
    "score",
    "retained %",
    "95 % interval",
    "TFLOPs",
    "ms",
    "n",
    "failed",
)


def markdown(title: str, results: Sequence[Result], failed: Mapping[tuple[str, str], str], notes: Sequence[str]) -> str:
    """Tables of a run: one line per setting with the average of the tasks, then what each task retains.

    Parameters
    ----------
    title : str
    results : sequence of Result
    failed : mapping
        Of :func:`~sparsevlm.evaluation.reporting.results.failures`.
    notes : sequence of str
        Sentences below the tables.
    """
    lines = [f"# {_one_line(title)}", "", *_rows(_SUMMARY, [_summary(one) for one in summary_results(results)])]
    tasks = list(dict.fromkeys(one.task for one in results if one.task != AVERAGE))
    if len(tasks) > 1:
        lines += ["", "Retained % of the dense score by task (in the line of dense: its score):", ""]
        by_place = {(one.selector, one.keep, one.seed, one.task): one for one in results}
        cells = [
            [*_name(one), *(_task_cell(by_place[one.selector, one.keep, one.seed, task]) for task in tasks)]
            for one in summary_results(results)
        ]
        lines += _rows(("selector", "keep", "seed", *tasks), cells)
    lines += ["", *(f"- {note}" for note in notes)]
    if failed:
        lines += ["", f"{len(failed)} rows are without a score in some setting and left out of its comparison:", ""]
        lines += [f"- {_one_line(f'{task}, {row}: {text}')}" for (task, row), text in list(failed.items())[:_MAX_NAMED]]
        lines += [f"- and {len(failed) - _MAX_NAMED} more; see predictions/"] if len(failed) > _MAX_NAMED else []
    return "\n".join(lines) + "\n"


def summary_results(results: Sequence[Result]) -> list[Result]:
    """One result per setting: the average of the tasks, or the only task."""
    averages = [one for one in results if one.task == AVERAGE]
    return averages or list(results)


def summary_cells(results: Sequence[Result]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and cells of the first table."""
    return _SUMMARY, [_summary(one) for one in summary_results(results)]


def _summary(one: Result) -> list[str]:
    return [
        *_name(one),
        f"{_fixed(one.avg_tokens, 1)} of {_fixed(one.n_visual, 0)}",
        _fixed(one.score, 4),
        _fixed(one.retained, 2),
        _interval(one, 2),
        _fixed(one.tflops, 4),
        _fixed(one.latency_ms, 1),
        str(one.n),
        str(one.n_failed),
    ]


def _name(one: Result) -> list[str]:
    return [one.selector, one.keep, one.seed]


def _task_cell(one: Result) -> str:
    if one.selector == "dense":
        return _fixed(one.score, 4)
    return f"{_fixed(one.retained, 1)} {_interval(one, 1)}".strip()


def _interval(one: Result, places: int) -> str:
    return "" if math.isnan(one.ci_low) else f"[{_fixed(one.ci_low, places)}, {_fixed(one.ci_high, places)}]"


def _fixed(value: float, places: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{places}f}"


def _rows(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(map(_cell, heads)) + " |",
        "|" + "---|" * len(heads),
        *("| " + " | ".join(map(_cell, row)) + " |" for row in cells),
    ]


def _cell(text: str) -> str:
    return _one_line(text).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
