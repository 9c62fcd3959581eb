"""What ``sparsevlm bench`` shows while it runs: steps, a table a case, and what is to be said of its figures."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import typer

from ..bench.cases import AnyCase, MixedCase
from ..bench.rows import append_rows
from ..bench.scatter import LIMIT, scattered
from ..bench.steps import Step
from .bench_tables import HEADS, print_case
from .busy import BusyWatch
from .terminal import StepLine

# What a column shows, by its head.
_OF_COLUMNS = {
    "first token": "first token: until it is there, of pictures from the processor on.",
    "/token": "/token: of every further one.",
    "x": "x: how many times faster than hf-dense in the same run.",
    "floor": "floor: times the least that this device can take for what has to be computed and read.",
    "GB": "GB: taken from the device, recording included.",
    "worst": "worst: the slowest call by the median of those of like size.",
}
_ON_HOOKS = (
    "ours-default is apply_sparsevlm(model); it and the others run on hooks around the model's own modules, as such a "
    "call does off a GPU, and ours-engine is ours with engine=True. "
)
_BASE = "hf-dense"


class Output(StepLine):
    """Shows and stores a run.

    Parameters
    ----------
    device : str
    busy : BusyWatch
        Made at the command's begin.
    target : Path, optional
        CSV file to add the rows to.
    about : str
        What holds of all tables: stands above the first. Each column is explained above the first table that has it.
    """

    def __init__(self, device: str, busy: BusyWatch, target: Path | None, about: str = "") -> None:
        super().__init__()
        self._about, self._explained = about, set[str]()
        self._device, self._busy, self._target = device, busy, target
        self._is_warned = busy.warn(device)

    def show_step(self, case: AnyCase, step: Step, left: str) -> None:
        """Shows the next step of a case."""
        provider = f"{step.provider} ({step.number} of {step.of})" if step.provider else ""
        parts = (provider, "" if step.begins else step.stage, left and f"{left} left")
        self.show(f"{case.name}: {', '.join(filter(None, parts))}", in_files=step.begins)

    def show_case(self, case: AnyCase, rows: list[dict[str, str]]) -> None:
        """Prints the table of a case and what is to be said of it, and stores its rows."""
        self.clear()
        # A CPU's caches hold small weights, and reading those is faster than any ceiling.
        if not self._device.startswith("cuda"):
            rows = [{**row, "floor": ""} for row in rows]
        print_case(case, rows, self._explain)
        if self._target is not None:
            append_rows(self._target, rows)
        if isinstance(case, MixedCase) or not (note := scatter_note(rows)):
            return
        typer.echo(note)
        self._is_warned = self._is_warned or self._busy.warn(self._device)

    def _explain(self, heads: Collection[str]) -> None:
        """Says of the columns of a table what was not said above one before."""
        new = [text for head, text in _OF_COLUMNS.items() if head in heads and head not in self._explained]
        if lines := [text for text in (self._about, " ".join(new)) if text]:
            typer.echo("\n".join([*lines, ""]))
        self._about = ""
        self._explained.update(heads)


def scatter_note(rows: Sequence[dict[str, str]]) -> str:
    """Names the figures of a case that are not to be trusted; empty where calls agree."""
    named, spoils_factors = [], False
    for (provider, keep), phases in scattered(rows).items():
        if not (heads := [head for phase, head in HEADS.items() if phase in phases]):
            continue
        spoils_factors |= provider == _BASE and not {"first_token", "total"}.isdisjoint(phases)
        widest = max(share for phase, share in phases.items() if phase in HEADS)
        named.append(f"{provider} {keep} ({', '.join(heads)}; up to {widest:.0%})")
    if not named:
        return ""
    factors = f"every x, as {_BASE} is among them" if spoils_factors else "their x"
    return (
        f"Calls disagree: the middle three fifths lie more than {LIMIT:.0%} of the median apart, so that the machine "
        f"looks busy. Do not trust these figures, nor {factors}: {'; '.join(named)}."
    )


def about_rows(cases: Sequence[AnyCase], weights: str, *, on_gpu: bool) -> str:
    """What holds of the rows of all tables."""
    is_mixed = any(isinstance(case, MixedCase) for case in cases)
    mean = "; of mixed shapes the mean, behind the library's own warm-up" if is_mixed else ""
    of_rows = "hf-static is measured where one sample decodes. " if on_gpu else _ON_HOOKS
    return f"Milliseconds, median{mean}. {of_rows}The weights are {weights}: time depends on the shape, not on them."
