"""Tables of README and documents from stored rows: ``python -m benchmark.tables`` rewrites them in place.

A document marks the place of a table with ``<!-- accuracy: FILTER -->`` and ``<!-- end of accuracy -->``. The filter
names columns of ``results/accuracy.csv`` and the values that its rows must have:
``suite=demo target_layers=default keep=0.5,0.25``.
"""

from __future__ import annotations

import re
from pathlib import Path

from sparsevlm.evaluation.csv_rows import read_rows

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "selectors.md", ROOT / "docs" / "ablation.md")
_BLOCK = re.compile(r"(<!-- accuracy: (?P<filter>.*?) -->\n).*?(<!-- end of accuracy -->\n)", re.DOTALL)
_AVERAGE = "average"

StoredRow = dict[str, str]


def stored_rows() -> list[StoredRow]:
    """All rows of ``sparsevlm eval ... --append-to benchmark/results/accuracy.csv``."""
    return read_rows(RESULTS / "accuracy.csv")


def chosen(rows: list[StoredRow], filter_text: str) -> list[StoredRow]:
    """Rows that a table's filter lets through."""
    for condition in filter_text.split():
        name, _, values = condition.partition("=")
        wanted = {value.replace("+", " ") for value in values.split(",")}
        rows = [row for row in rows if row[name] in wanted]
    return rows


def accuracy_table(rows: list[StoredRow]) -> str:
    """One line per setting, in the order of the rows; retained percent of the dense score on average and by task.

    Raises
    ------
    ValueError
        If there are no rows, or dense ones of several runs differ in what they were measured on.
    """
    if not rows:
        raise ValueError("no stored row fits the filter of a table")
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != _AVERAGE]
    lines = [
        "| selector | target layers | keep | visual tokens | average | " + " | ".join(tasks) + " |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    settings: dict[tuple[str, ...], dict[str, StoredRow]] = {}
    for row in rows:
        key = (row["selector"], row["target_layers"], row["keep"], row["seed"], row["options"])
        settings.setdefault(key, {})[row["task"]] = row
    for (selector, layers, keep, _, options), by_task in settings.items():
        is_dense = selector == "dense"
        average = by_task[_AVERAGE]
        cells = [_dense_score(by_task[task]) if is_dense else _retained(by_task[task]) for task in tasks]
        overall = _dense_score(average) if is_dense else f"**{_retained(average)}** {_interval(average)}"
        where = "–" if is_dense or selector == "downsample" else layers.replace(" ", ", ")
        lines.append(
            f"| {selector}{f' ({options})' if options else ''} | {where} | {'–' if is_dense else keep} | "
            f"{float(average['avg_tokens']):.0f} of {float(average['n_visual']):.0f} | {overall} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join([*lines, "", _origin(rows)]) + "\n"


def _dense_score(row: StoredRow) -> str:
    return f"{100 * float(row['dense_score']):.1f} %"


def _retained(row: StoredRow) -> str:
    return f"{float(row['retained']):.1f}"


def _interval(row: StoredRow) -> str:
    return f"[{float(row['ci_low']):.1f}, {float(row['ci_high']):.1f}]" if row["ci_low"] else ""


def _origin(rows: list[StoredRow]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows))

    n = ", ".join(sorted({row["n"] for row in rows if row["task"] != _AVERAGE}, key=int))
    return (
        f"Retained percent of the dense score (of dense: the score), n = {n} hold-out questions a task, 95 % intervals "
        f"of a paired bootstrap; {all_of('dtype')}, {all_of('device')}, torch {all_of('torch')}, transformers "
        f"{all_of('transformers')}, commit {all_of('commit')}; rows with their commands: accuracy.csv in "
        "benchmark/results."
    )


def with_tables(text: str) -> str:
    """A document's text with its tables made anew."""
    rows = stored_rows()

    def table(match: re.Match[str]) -> str:
        return match[1] + accuracy_table(chosen(rows, match["filter"])) + match[3]

    return _BLOCK.sub(table, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        if document.exists():
            document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
