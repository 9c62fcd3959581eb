"""Stored rows of ``benchmark.bench_turns`` as a Markdown table."""

from __future__ import annotations

from benchmark.e2e_rows import E2E, StoredRow, measured_on, of_newest_commit, read_e2e

TURNS = E2E.with_name("turns.csv")
_AVERAGE, _DENSE = "average", "dense"
_NONE = "–"


def read_turns() -> list[StoredRow]:
    """Loads all rows."""
    return read_e2e(TURNS)


def turns_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table of each setting's last run at the newest commit: the score of second questions."""
    rows = _last_runs(rows)
    if not rows:
        return "No rows yet: `python -m benchmark.bench_turns` adds them.\n"
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != _AVERAGE]
    lines = [
        f"| selector | keep | turns | second question | first one | prefilled again | features | {' | '.join(tasks)} |",
        "|---" * (7 + len(tasks)) + "|",
    ]
    settings: dict[tuple[str, str, str], dict[str, StoredRow]] = {}
    for row in rows:
        settings.setdefault(_setting(row), {})[row["task"]] = row
    for (selector, keep, turns), by_task in settings.items():
        average = by_task[_AVERAGE]
        said = "in one conversation" if turns == _DENSE else turns
        if average["note"]:
            cells = [average["note"], *[_NONE] * (3 + len(tasks))]
        else:
            interval = f" [{_percent(average['ci_low'])}, {_percent(average['ci_high'])}]"
            cells = [f"**{_percent(average['accuracy'])}**{interval}", _percent(average["first_accuracy"])]
            again, n_bytes = float(average["tokens_again"]), float(average["features_bytes"])
            cells += [f"{again:.0f} tokens" if again else _NONE, f"{n_bytes / 1e3:.0f} kB" if n_bytes else _NONE]
            cells += [_percent(by_task[task]["accuracy"]) for task in tasks]
        lines.append(f"| {selector} | {_NONE if selector == _DENSE else keep} | {said} | {' | '.join(cells)} |")

    n = ", ".join(dict.fromkeys(row["n"] for row in rows if row["task"] == _AVERAGE and row["n"] != "0"))
    caption = (
        f"Percent answered right of n = {n} second questions, 95 % intervals of a bootstrap, and of first ones. Our "
        f"small model on its drawn scenes; {measured_on(rows)}; rows with their commands: turns.csv in "
        "benchmark/results."
    )
    return "\n".join([*lines, "", caption]) + "\n"


def turns_figure(rows: list[StoredRow]) -> str:
    """Formats the score of one setting's second questions in percent, for a sentence.

    Raises
    ------
    ValueError
        If there is another number of rows than one.
    """
    rows = _last_runs(rows)
    if len(rows) != 1:
        raise ValueError(f"a figure needs one stored row, its filter finds {len(rows)}")
    return _percent(rows[0]["accuracy"])


def _last_runs(rows: list[StoredRow]) -> list[StoredRow]:
    """Rows of the newest commit, and of each setting's last run."""
    rows = sorted(of_newest_commit(rows), key=lambda row: row["timestamp"])
    last = {_setting(row): row["timestamp"] for row in rows}
    return [row for row in rows if row["timestamp"] == last[_setting(row)]]


def _setting(row: StoredRow) -> tuple[str, str, str]:
    return row["selector"], row["keep"], row["turns"]


def _percent(value: str) -> str:
    return f"{100 * float(value):.1f}" if value else _NONE
