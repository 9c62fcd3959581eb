"""What the engine was to reach, beside what the stored rows say, as a Markdown table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmark.e2e_rows import BASE, PHASES, Setting, StoredRow, metric_of, metrics_of_last_runs, of_newest_commit
from benchmark.ready_rows import EMPTY, FILLED
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.selectors import SELECTORS

Runs = dict[str, dict[Setting, dict[tuple[str, str], StoredRow]]]
Measured = tuple[float | None, str]  # None where no row says it; and whose it is, where a line is about several
Measure = Callable[[Runs, str], Measured]

_DEFAULT, _QUARTER, _HALF_TOWER = ("ours-default", "adaptive"), ("ours", "0.25"), ("ours-vision", "0.25")
_FLOAT8 = ("ours-fp8", "0.25")
_DENSE, _VLLM = ("ours-dense", "1.0"), ("vllm-dense", "1.0")
_SIZES = ("v256-b1-n1", "v1024-b1-n1", "v4096-b1-n1")
_PICTURE, _BATCH, _LONG, _MIXED = "picture896-b1-n1", "v1024-b32-n64", "v576-b1-n64", "mixed200"
_KEEP = "0.25"
_NONE = "–"


@dataclass(frozen=True)
class Goal:
    """A line of the table.

    Attributes
    ----------
    call, measure : str
    wanted : dict of str to float
        By case.
    of : callable
        What the rows of the last runs say about a case.
    is_most : bool
        Whether what is wanted is the most, not the least.
    """

    call: str
    measure: str
    wanted: dict[str, float]
    of: Measure
    is_most: bool = False

    def line(self, runs: Runs) -> str:
        """Formats it, with what is missed in bold."""
        cells = [_cell(self.of(runs, case), wanted, self.is_most) for case, wanted in self.wanted.items()]
        limits = ", ".join(f"{wanted:g}" for wanted in self.wanted.values())
        shown = [self.call, self.measure, ", ".join(self.wanted), f"{'≤' if self.is_most else '≥'} {limits}"]
        return f"| {' | '.join([*shown, ', '.join(cells)])} |"


def _cell(measured: Measured, wanted: float, is_most: bool) -> str:
    value, whose = measured
    if value is None:
        return _NONE
    shown = f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    is_met = value <= wanted if is_most else value >= wanted
    return (shown if is_met else f"**{shown}**") + (f" ({whose})" if whose else "")


def _faster(call: Setting, other: Setting, phase: str) -> Measure:
    """How many times faster than another: of mixed shapes and hf-dense by its own row, on the requests of both."""

    def of(runs: Runs, case: str) -> Measured:
        found, base = (runs.get(case, {}).get(setting, {}) for setting in (call, other))
        if metric_of(case) != "ms" and other == BASE:
            return _value(found.get((phase, "x"))), ""
        value, by = (_value(rows.get((phase, metric_of(case)))) for rows in (found, base))
        return (None if value is None or by is None else by / value), ""

    return of


def _above_bound(call: Setting, phase: str) -> Measure:
    def of(runs: Runs, case: str) -> Measured:
        row = runs.get(case, {}).get(call, {}).get((phase, metric_of(case)))
        value, bound = _value(row), _value(row, "floor")
        return (None if value is None or bound is None else value / bound), ""

    return of


def _memory(call: Setting) -> Measure:
    def of(runs: Runs, case: str) -> Measured:
        value, base = (_value(runs.get(case, {}).get(one, {}).get(("total", "bytes"))) for one in (call, BASE))
        return (None if value is None or base is None else value / base), ""

    return of


def _worst_call(call: Setting) -> Measure:
    return lambda runs, case: (_value(runs.get(case, {}).get(call, {}).get(("total", "worst_by_median"))), "")


def _slowest_selector(is_before: bool) -> Measure:
    """The least factor of the selectors of one placement, against the engine with nothing dropped."""

    def of(runs: Runs, case: str) -> Measured:
        factors = {}
        for (provider, keep), found in runs.get(case, {}).items():
            name = found.get(("first_token", metric_of(case)), {}).get("selector", "")
            if keep != _KEEP or name not in SELECTORS or provider not in ("ours", f"ours-{name}"):
                continue
            value, _ = _faster((provider, _KEEP), _DENSE, "first_token")(runs, case)
            if value is not None and (SelectorTraits.of(SELECTORS[name]()).placement == BEFORE_DECODER) == is_before:
                factors[name] = value
        return min(((value, name) for name, value in factors.items()), default=(None, ""))

    return of


def _value(row: StoredRow | None, column: str = "p50") -> float | None:
    return float(row[column]) if row is not None and row[column] else None


def _by_size(*wanted: float) -> dict[str, float]:
    return dict(zip(_SIZES, wanted, strict=True))


def _times(other: str, phase: str) -> str:
    return f"times faster than {other}, {PHASES[phase]}"


_FIRST, _WHOLE = "first_token", "total"
_OURS = {"default": _DEFAULT, "keep=0.25": _QUARTER}
_AGAINST_VLLM = {
    _FIRST: {**_by_size(4, 3, 2.5), _PICTURE: 3, _MIXED: 3},
    _WHOLE: {_LONG: 1.4, _BATCH: 2.2, _MIXED: 1.4},
}
GOALS = (
    Goal("default", _times("hf-dense", _FIRST), {**_by_size(5, 6, 6), _PICTURE: 5}, _faster(_DEFAULT, BASE, _FIRST)),
    Goal("keep=0.25", _times("hf-dense", _FIRST), {**_by_size(7, 8, 6), _PICTURE: 5}, _faster(_QUARTER, BASE, _FIRST)),
    Goal(
        "keep=0.25, vision_keep=0.5", _times("hf-dense", _FIRST), _by_size(7, 10, 9), _faster(_HALF_TOWER, BASE, _FIRST)
    ),
    *(
        Goal(name, _times("hf-dense", _WHOLE), {_BATCH: 7.5, _MIXED: 6}, _faster(call, BASE, _WHOLE))
        for name, call in _OURS.items()
    ),
    Goal("default", _times("ours-dense", _FIRST), _by_size(1, 1.3, 1.6), _faster(_DEFAULT, _DENSE, _FIRST)),
    Goal(
        "slowest selector inside the decoder, keep=0.25",
        _times("ours-dense", _FIRST),
        _by_size(1, 1.3, 1.6),
        _slowest_selector(is_before=False),
    ),
    Goal(
        "slowest selector before the decoder, keep=0.25",
        _times("ours-dense", _FIRST),
        _by_size(1, 1.5, 2),
        _slowest_selector(is_before=True),
    ),
    *(
        Goal(name, _times("ours-dense", _WHOLE), {_MIXED: 1.15}, _faster(call, _DENSE, _WHOLE))
        for name, call in _OURS.items()
    ),
    *(
        Goal(name, _times("vllm-dense", phase), wanted, _faster(call, _VLLM, phase))
        for phase, wanted in _AGAINST_VLLM.items()
        for name, call in _OURS.items()
    ),
    *(
        Goal(name, "worst call by the median of like size", {_MIXED: 2}, _worst_call(call), is_most=True)
        for name, call in _OURS.items()
    ),
    Goal(
        "keep=0.25", "first token by its bound", _by_size(1.6, 1.5, 1.5), _above_bound(_QUARTER, _FIRST), is_most=True
    ),
    Goal(
        "keep=0.25",
        "each further token by its bound",
        {"v1024-b1-n64": 1.15},
        _above_bound(_QUARTER, "decode_per_token"),
        is_most=True,
    ),
    Goal(
        'keep=0.25, weights="fp8"',
        "each further token by the bound of the model's own weights",
        {"v1024-b1-n64": 0.7},
        _above_bound(_FLOAT8, "decode_per_token"),
        is_most=True,
    ),
    *(
        Goal(name, "peak of memory by that of hf-dense", {"v16384-b1-n1": 1}, _memory(call), is_most=True)
        for name, call in _OURS.items()
    ),
)
READY = {FILLED: 12.0, EMPTY: 45.0}  # seconds until apply and warm-up are over


def goals_table(rows: list[StoredRow], ready: list[StoredRow]) -> str:
    """Makes the table from rows of whole calls and rows of the time until ready, each of the commit measured last."""
    runs = metrics_of_last_runs(rows)
    lines = ["| call | measure | case | goal | measured |", "|---" * 5 + "|"]
    lines += [goal.line(runs) for goal in GOALS]
    ready = [
        row for row in of_newest_commit(ready) if row["operation"] == "apply and warm-up" and row["metric"] == "ms"
    ]
    for name, (provider, _) in _OURS.items():
        seconds = {row["timing"]: float(row["p50"]) / 1e3 for row in ready if row["provider"] == provider}
        cells = [_cell((seconds.get(cache), ""), wanted, is_most=True) for cache, wanted in READY.items()]
        limits = ", ".join(f"{wanted:g}" for wanted in READY.values())
        lines.append(f"| {name} | seconds until ready | {', '.join(READY)} | ≤ {limits} | {', '.join(cells)} |")
    shown = [row for of_case in runs.values() for found in of_case.values() for row in found.values()]
    devices, commits = (", ".join(dict.fromkeys(row[name] for row in [*shown, *ready])) for name in ("gpu", "commit"))
    caption = (
        "Bold: missed. Cases, calls and bounds are those of this page's other tables; until ready: `apply_sparsevlm` "
        f"with its warm-up. {devices}, commit {commits}."
    )
    return "\n".join([*lines, "", caption]) + "\n"
