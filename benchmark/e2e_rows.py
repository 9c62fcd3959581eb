"""Stored rows of ``sparsevlm bench``: reading, the last run of each case, Markdown tables."""

from __future__ import annotations

import csv
from pathlib import Path

E2E = Path(__file__).parent / "results" / "e2e.csv"
PHASES = {"first_token": "first token", "decode_per_token": "each further token", "total": "whole generate"}
BASE = ("hf-dense", "1.0")
_NONE = "–"

StoredRow = dict[str, str]
Setting = tuple[str, str]  # provider and keep


def read_e2e(file: Path = E2E) -> list[StoredRow]:
    """Loads all rows of a CSV file; a missing file has none."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def last_runs(rows: list[StoredRow]) -> dict[str, dict[Setting, dict[str, StoredRow]]]:
    """Returns the rows of time of each case's last run, by case, provider with keep, and phase.

    All rows of a case in one run have the same time stamp, so that what is compared was measured in turn.
    """
    last: dict[str, str] = {}
    for row in rows:
        last[row["case"]] = max(last.get(row["case"], ""), row["timestamp"])
    runs: dict[str, dict[Setting, dict[str, StoredRow]]] = {}
    for row in rows:
        if row["metric"] == "ms" and row["timestamp"] == last[row["case"]]:
            of_case = runs.setdefault(row["case"], {})
            of_case.setdefault((row["provider"], row["keep"]), {})[row["phase"]] = row
    return runs


def e2e_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table: per case, provider and phase the median, its roofline bound, and the speed-up."""
    if not rows:
        return "No rows yet: `python -m benchmark.bench_e2e` on a GPU adds them.\n"
    heads = ["case", "provider", "keep"]
    for phase in PHASES.values():
        heads += [f"{phase}, ms", "bound", "x"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    runs = last_runs(rows)
    for case, settings in runs.items():
        for (provider, keep), by_phase in settings.items():
            cells = [case, provider, keep]
            for phase in PHASES:
                cells += _cells(by_phase.get(phase), settings.get(BASE, {}).get(phase))
            lines.append("| " + " | ".join(cells) + " |")
    shown = [row for settings in runs.values() for phases in settings.values() for row in phases.values()]
    return "\n".join([*lines, "", _origin(shown)]) + "\n"


def memory_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table: per case and provider the most memory that a first call took from the device, in GB.

    Rows of memory have the time stamp of their case's run, as those of time.
    """
    if not rows:
        return "No rows yet: `python -m benchmark.bench_e2e` on a GPU adds them.\n"
    last = {case: max(row["timestamp"] for row in rows if row["case"] == case) for case in _cases(rows)}
    shown = [row for row in rows if row["metric"] == "bytes" and row["timestamp"] == last[row["case"]]]
    settings = list(dict.fromkeys((row["provider"], row["keep"]) for row in shown))
    heads = ["case", *(provider if keep == "1.0" else f"{provider} {keep}" for provider, keep in settings)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case in _cases(shown):
        found = {(row["provider"], row["keep"]): row for row in shown if row["case"] == case}
        cells = [f"{float(found[key]['p50']) / 1e9:.1f}" if key in found else _NONE for key in settings]
        lines.append("| " + " | ".join([case, *cells]) + " |")
    caption = (
        "GB that torch had taken from the device at most in a first call of a case, weights, recording and compiling "
        f"included. {_where(shown)}"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def figure(rows: list[StoredRow]) -> str:
    """Formats one median in milliseconds, for a sentence.

    Raises
    ------
    ValueError
        If the last run of the case has another number of such rows than one.
    """
    found = [row for of_case in last_runs(rows).values() for phases in of_case.values() for row in phases.values()]
    if len(found) != 1:
        raise ValueError(f"a figure needs one stored row, its filter finds {len(found)}")
    return f"{float(found[0]['p50']):.0f}"


def _cases(rows: list[StoredRow]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def _cells(row: StoredRow | None, base: StoredRow | None) -> list[str]:
    if row is None:
        return [_NONE] * 3
    if row["note"] or not row["p50"]:
        return [row["note"] or _NONE, _NONE, _NONE]
    median = float(row["p50"])
    ratio = f"{float(base['p50']) / median:.2f}" if base and base["p50"] else _NONE
    return [f"{median:.1f}", f"{float(row['floor']):.1f}" if row["floor"] else _NONE, ratio]


def _origin(rows: list[StoredRow]) -> str:
    return (
        "Medians; bound: the roofline bound, the least that the device can take for what has to be computed and read, "
        "from its measured peaks; x: how many times faster than hf-dense in the same run. "
        "Cases: visual tokens, batch, new tokens. "
        f"{_where(rows)}"
    )


def _where(rows: list[StoredRow]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(row[name] for row in rows))

    return (
        f"{all_of('model')}; {all_of('dtype')}, {all_of('gpu')}, torch {all_of('torch')}, triton {all_of('triton')}, "
        f"transformers {all_of('transformers')}, commit {all_of('commit')}; rows with their commands: e2e.csv in "
        "benchmark/results."
    )
