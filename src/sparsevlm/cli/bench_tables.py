"""Tables that ``sparsevlm bench`` prints, one a case."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..bench.cases import AnyCase

_BASE = ("hf-dense", "1.0")
# Heads of times, by their phases.
HEADS = {
    **{phase: phase for phase in ("preprocess", "vision", "prefill")},
    **{"first_token": "first token", "decode_per_token": "/token", "total": "total"},
}
_HEADS = ("preprocess", "vision", "prefill", "first token", "x", "floor", "/token", "total", "x", "GB", "worst")
Row = Mapping[str, str]


def print_case(
    case: AnyCase, rows: list[dict[str, str]], explain: Callable[[Collection[str]], None] = lambda heads: None
) -> None:
    """Prints the rows of a case, without columns that have no figure; ``explain`` is called with the heads before."""
    of: dict[tuple[str, str], dict[tuple[str, str], Row]] = {}
    for row in rows:
        of.setdefault((row["provider"], row["keep"]), {})[row["phase"], row["metric"]] = row
    base = of.get(_BASE, {})
    notes: list[str] = []
    lines: list[tuple[str, str, list[str]]] = []
    for (provider, keep), found in of.items():
        total = _time(found, "total")
        note = next(iter(found.values()))["note"]
        is_measured = total is not None and bool(total["p50"])
        lines.append((provider, keep, _cells(found, base) if is_measured else []))
        if note:
            notes.append(f"{provider}: {note}")
    shown = [i for i in range(len(_HEADS)) if any(cells and cells[i] for _, _, cells in lines)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, title=case.name, title_justify="left")
    for head in ("provider", "keep"):
        table.add_column(head)
    for i in shown:
        table.add_column(_HEADS[i], justify="right", no_wrap=True)
    for provider, keep, cells in lines:
        table.add_row(provider, keep, *(cells[i] for i in shown if cells))
    # Wide enough for a log file; a terminal shows what fits.
    console = Console(width=None if sys.stdout.isatty() else 140)
    explain([_HEADS[i] for i in shown])
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _cells(found: Mapping[tuple[str, str], Row], base: Mapping[tuple[str, str], Row]) -> list[str]:
    first, total = _time(found, "first_token"), _time(found, "total")
    peak, worst = found.get(("total", "bytes")), found.get(("total", "worst_by_median"))
    return [
        *(_number(_time(found, phase)) for phase in ("preprocess", "vision", "prefill", "first_token")),
        _times_faster(found, base, "first_token"),
        _ratio(first, "floor"),
        _number(_time(found, "decode_per_token")),
        _number(total),
        _times_faster(found, base, "total"),
        "" if peak is None else f"{float(peak['p50']) / 1e9:.2f}",
        "" if worst is None else f"{float(worst['p50']):.2f}",
    ]


def _time(found: Mapping[tuple[str, str], Row], phase: str) -> Row | None:
    """Row of a phase: of requests of mixed shapes the mean, else the median."""
    return found.get((phase, "mean_ms")) or found.get((phase, "ms"))


def _times_faster(found: Mapping[tuple[str, str], Row], base: Mapping[tuple[str, str], Row], phase: str) -> str:
    if (measured := found.get((phase, "x"))) is not None:
        return f"{float(measured['p50']):.2f}"
    own, theirs = _time(found, phase), _time(base, phase)
    if own is None or theirs is None or (phase, "mean_ms") in found or not theirs["p50"]:
        return ""
    return f"{float(theirs['p50']) / float(own['p50']):.2f}"


def _number(row: Row | None) -> str:
    return "" if row is None or not row["p50"] else f"{float(row['p50']):.1f}"


def _ratio(row: Row | None, below: str) -> str:
    return "" if row is None or not row[below] else f"{float(row['p50']) / float(row[below]):.2f}"
