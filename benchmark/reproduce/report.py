"""The table of a run: scores, what is retained of the dense ones, and published figures beside."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmark.e2e_rows import StoredRow
from benchmark.reproduce.plan import Setting
from benchmark.reproduce.published import Ours, comparisons, published_of, share_of
from benchmark.reproduce.scores import Units, headline, paired, retained_with_interval, task_score
from benchmark.reproduce.store import Result, Store
from benchmark.validity import agreement_lines
from sparsevlm.evaluation.metrics.bootstrap import Retained
from sparsevlm.evaluation.settings import AVERAGE, DENSE

COLUMNS = (
    *("model", "selector", "keep", "arguments", "task", "metric", "n", "score", "dense_score", "retained"),
    *("ci_low", "ci_high", "visual_tokens", "tokens_at_inputs", "tokens_at_outputs", "published", "published_in"),
    *("limit", "batch_size", "processes", "device", "dtype", "torch", "transformers", "lmms_eval", "weights", "commit"),
    *("seconds", "timestamp"),
)
_NONE = "–"
_NOTHING = Retained(math.nan, math.nan, math.nan)
_NOTES = (
    "Scores are lmms-eval's; of MME perception plus cognition. In brackets: percent of the dense score, with the 95 % "
    "interval of a paired bootstrap over rows (of MME over pairs of questions within their category) where the rows "
    "give the score. It covers the choice of rows alone; where not one row was lost it has no width.",
    "average: the mean of the tasks' percentages; none where a task is missing.",
    "tokens: visual tokens averaged over the inputs and over the outputs of the decoder's layers, measured.",
    "published: averages that others report for this checkpoint at this share of the tokens, over their own "
    "benchmarks, so that levels compare only roughly.",
)


@dataclass(frozen=True)
class Line:
    """One setting of the table.

    Attributes
    ----------
    setting : Setting
    results : dict of str to Result
        By task; those that are there.
    retained : dict of str to Retained
        By task; those that have a dense score above zero.
    average : Retained
    """

    setting: Setting
    results: dict[str, Result]
    retained: dict[str, Retained]
    average: Retained

    def tokens(self, kind: str) -> float:
        """Mean over tasks of ``visual``, ``inputs`` or ``outputs``."""
        values = [one.tokens[kind] for one in self.results.values() if kind in one.tokens]
        return fmean(values) if values else math.nan


def make_lines(settings: Sequence[Setting], tasks: Sequence[str], store: Store) -> list[Line]:
    """Sets the stored results of all settings beside the dense ones."""
    dense = {task: found for task in tasks if (found := store.read(DENSE, task)) is not None}
    whole = {task: task_score(found.metrics) for task, found in dense.items()}
    rows_of_dense = {task: store.samples(DENSE, task) for task in dense}
    lines = []
    for setting in settings:
        results = {task: found for task in tasks if (found := store.read(setting.name, task)) is not None}
        values: dict[str, float] = {}
        units: dict[str, tuple[Units, Units] | None] = {}
        for task, found in results.items():
            if whole.get(task):
                score = task_score(found.metrics)
                values[task] = 100 * score / whole[task]
                both = (score, store.samples(setting.name, task)), (whole[task], rows_of_dense[task])
                units[task] = None if setting.name == DENSE else paired(headline(found.metrics), *both)
        retained = {task: retained_with_interval({task: values[task]}, units) for task in values}
        average = retained_with_interval(values, units) if len(values) == len(tasks) else _NOTHING
        lines.append(Line(setting, results, retained, average))
    return lines


def markdown(
    title: str,
    lines: Sequence[Line],
    tasks: Sequence[str],
    published: Sequence[StoredRow],
    n_visual: int,
    failed: Mapping[tuple[str, str], str],
) -> str:
    """Makes the page of a run.

    Parameters
    ----------
    title : str
    lines : sequence of Line
    tasks : sequence of str
    published : sequence of dict
        Rows of ``published.csv`` of this checkpoint.
    n_visual : int
    failed : mapping of (setting, task) to str
        Last line of the error.
    """
    heads = ["selector", "keep", "tokens", *tasks, "average", "published"]
    page = [f"# {title}", "", _row(heads), "|---" * len(heads) + "|"]
    for line in lines:
        cells = [f"`{line.setting.selector}`", line.setting.keep or _NONE, _tokens(line)]
        cells += [_task_cell(line, task) for task in tasks]
        page.append(_row([*cells, _interval(line.average), _published(line, published, n_visual)]))
    page += ["", *(f"- {note}" for note in _NOTES), *(f"- {note}" for note in _differing(lines))]
    if failed:
        page += ["", f"{len(failed)} without a result:", ""]
        page += [f"- {setting}, {task}: {reason}" for (setting, task), reason in failed.items()]
    return "\n".join([*page, "", *_beside(lines, published, n_visual)]).rstrip() + "\n"


def csv_text(
    model: str, lines: Sequence[Line], tasks: Sequence[str], published: Sequence[StoredRow], n_visual: int
) -> str:
    """Makes a CSV file with a row for each setting and task, and for each average."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    dense = next(line for line in lines if line.setting.name == DENSE)
    for line in lines:
        shared = {"model": model, "selector": line.setting.selector, "keep": line.setting.keep}
        shared["arguments"] = line.setting.arguments_text
        for task in tasks:
            if task in line.results:
                writer.writerow({**shared, **_task_columns(line, task, dense)})
        theirs = published_of(published, _ours(line, n_visual))
        average = {"task": AVERAGE, **_retained_columns(line.average)}
        average["published"] = "; ".join(row["retained"] for row in theirs)
        average["published_in"] = "; ".join(row["source"] for row in theirs)
        for name, kind in _TOKEN_COLUMNS.items():
            average[name] = _number(line.tokens(kind), 2)
        writer.writerow({**shared, **average})
    return out.getvalue()


_TOKEN_COLUMNS = {"visual_tokens": "visual", "tokens_at_inputs": "inputs", "tokens_at_outputs": "outputs"}


def _task_columns(line: Line, task: str, dense: Line) -> dict[str, str]:
    found = line.results[task]
    of_dense = dense.results.get(task)
    columns = {"task": task, "metric": "+".join(headline(found.metrics)), "n": str(found.n)}
    columns["score"] = _number(task_score(found.metrics), 4)
    columns["dense_score"] = "" if of_dense is None else _number(task_score(of_dense.metrics), 4)
    columns |= _retained_columns(line.retained.get(task, _NOTHING))
    columns |= {name: _number(found.tokens.get(kind, math.nan), 2) for name, kind in _TOKEN_COLUMNS.items()}
    columns |= {name: found.origin.get(name, "") for name in ("batch_size", "processes", "device", "timestamp")}
    stored = {**found.fingerprint, "lmms_eval": found.fingerprint.get("lmms-eval")}
    for name in ("limit", "dtype", "torch", "transformers", "lmms_eval", "weights", "commit"):
        columns[name] = "" if stored.get(name) is None else str(stored[name])
    return {**columns, "seconds": _number(found.seconds, 1)}


def _retained_columns(retained: Retained) -> dict[str, str]:
    return {
        "retained": _number(retained.value, 2),
        "ci_low": _number(retained.low, 2),
        "ci_high": _number(retained.high, 2),
    }


def _beside(lines: Sequence[Line], published: Sequence[StoredRow], n_visual: int) -> list[str]:
    """How far the ranking agrees with published ones, and where these stand."""
    ours = [_ours(line, n_visual) for line in lines]
    used = [row for one in ours for row in published_of(published, one)]
    if not used:
        return ["No published table fits this checkpoint and these budgets."]
    page = ["Published in:", ""]
    for row in {row["source"]: row for row in used}.values():
        name = f"[{row['source']}]({row['url']})" if row["url"] else row["source"]
        read_in = "" if row["read_in"] == "the source" else f", by {row['read_in']}"
        page.append(f"- {name}{read_in}: {row['checkpoint']}, {row['benchmarks'] or 'benchmarks not named'}")
    if found := comparisons(published, ours):
        page += ["", "Pairs of methods, where three or more are in both tables:", "", *agreement_lines(found)]
    return page


def _differing(lines: Sequence[Line]) -> list[str]:
    """What is not the same in all results, and may move single answers."""
    notes = []
    for name in ("batch_size", "processes", "device"):
        values = dict.fromkeys(found.origin.get(name, "") for line in lines for found in line.results.values())
        if len(values) > 1:
            notes.append(
                f"Results of this table are of several values of {name.replace('_', ' ')}: {', '.join(values)}."
            )
    return notes


def _ours(line: Line, n_visual: int) -> Ours:
    return Ours(line.setting, share_of(line.setting, n_visual), line.average.value)


def _published(line: Line, published: Sequence[StoredRow], n_visual: int) -> str:
    rows = published_of(published, _ours(line, n_visual))
    return "; ".join(f"{float(row['retained']):.1f} ({row['source'].split(',')[0]})" for row in rows) or _NONE


def _task_cell(line: Line, task: str) -> str:
    if task not in line.results:
        return _NONE
    score = f"{task_score(line.results[task].metrics):.4g}"
    if line.setting.name == DENSE or task not in line.retained:
        return score
    return f"{score} ({_interval(line.retained[task])})"


def _interval(retained: Retained) -> str:
    if math.isnan(retained.value):
        return _NONE
    if math.isnan(retained.low):
        return f"{retained.value:.1f}"
    return f"{retained.value:.1f} [{retained.low:.1f}, {retained.high:.1f}]"


def _tokens(line: Line) -> str:
    values = [line.tokens(kind) for kind in ("inputs", "outputs")]
    return _NONE if math.isnan(values[0]) else " / ".join(f"{value:.1f}" for value in values)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float, places: int) -> str:
    return "" if math.isnan(value) else str(round(value, places))
