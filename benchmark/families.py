"""Accuracy of one model over all kinds of tasks, as a Markdown table: a column for each kind."""

from __future__ import annotations

from benchmark.accuracy_rows import Cell, interval_of_mean, mean_retained, of_suites
from benchmark.e2e_rows import StoredRow, measured_on
from sparsevlm.evaluation.settings import DENSE

_HEADS = {"demo": "scenes"}  # where the name of a suite says less


def families_table(rows: list[StoredRow]) -> str:
    """Makes a line for each selector and budget: the retained percent on average and by kind of task.

    Parameters
    ----------
    rows : list of dict
        Rows of ``accuracy.csv`` of one model; :func:`~benchmark.accuracy_rows.of_suites` chooses among them.

    Raises
    ------
    ValueError
        As :func:`~benchmark.accuracy_rows.of_suites` does.
    """
    found = of_suites(rows)
    shown = [row for by_suite in found.values() for row in by_suite.values()]
    suites = list(next(iter(found.values())))
    heads = ["selector", "keep", "visual tokens", "average", *(_HEADS.get(suite, suite) for suite in suites)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [_line(setting, found[setting]) for setting in sorted(found, key=lambda one: _place(one, found[one]))]
    n = sorted({int(row["n"]) for row in shown})
    caption = (
        "Retained percent of the dense score (of dense: the score), the mean of the tasks of a kind; average: of the "
        f"kinds, with a 95 % interval. n = {' to '.join(dict.fromkeys(str(one) for one in (n[0], n[-1])))} hold-out "
        f"questions a cell. Model {shown[0]['model']}; {measured_on(shown, device='device')}; rows with their "
        "commands: accuracy.csv in benchmark/results."
    )
    return "\n".join([*lines, "", caption]) + "\n"


def families_figure(rows: list[StoredRow]) -> str:
    """Formats the average over the kinds of tasks of one selector at one budget, for a sentence.

    Raises
    ------
    ValueError
        If the rows have another number of settings than one.
    """
    found = of_suites(rows)
    if len(found) != 1:
        raise ValueError(f"a figure needs one selector at one budget, its filter finds {len(found)}")
    return f"{mean_retained(*found.values()):.1f}"


def _place(setting: Cell, by_suite: dict[str, StoredRow]) -> tuple[float, float]:
    """Dense first, then by budget from large to small, those without one last, and within a budget by the average."""
    selector, keep, *_ = setting
    if selector == DENSE:
        return -2.0, 0.0
    return 0.0 if keep == "adaptive" else -float(keep), -mean_retained(by_suite)


def _line(setting: Cell, by_suite: dict[str, StoredRow]) -> str:
    (selector, keep, layers, options, seed), rows = setting, list(by_suite.values())
    changed = [options] if options else []
    changed += [f"seed {seed}"] if seed not in ("", "0") else []
    changed += [f"target layers {layers}"] if layers != "default" else []
    name = f"{selector} ({', '.join(changed)})" if changed else selector
    tokens = sum(float(row["avg_tokens"]) for row in rows) / len(rows)
    if selector == DENSE:
        scores = [100 * float(row["dense_score"]) for row in rows]
        cells = [f"{sum(scores) / len(scores):.1f} %", *(f"{score:.1f} %" for score in scores)]
    else:
        low, high = interval_of_mean(by_suite)
        cells = [f"**{mean_retained(by_suite):.1f}** [{low:.1f}, {high:.1f}]"]
        cells += [f"{float(row['retained']):.1f}" for row in rows]
    return f"| {' | '.join([name, '–' if selector == DENSE else keep, f'{tokens:.0f}', *cells])} |"
