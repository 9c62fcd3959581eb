"""Retained score against visual tokens, one line per selector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..settings import AVERAGE, DENSE, DOWNSAMPLE
from .results import Result

_COLUMNS = 4
_PANEL = (4.2, 3.2)  # inches
_MARKERS = "osD^vP*X<>ph"
_BASELINES = {"random": "0.35", "grid": "0.5", DOWNSAMPLE: "0.65"}


def plot(results: Sequence[Result], title: str, files: Sequence[Path]) -> None:
    """Draw the average and every task, with 95 % intervals, into a picture file per suffix.

    Parameters
    ----------
    results : sequence of Result
    title : str
    files : sequence of Path
        Ending in ``.png`` or ``.svg``.
    """
    tasks = sorted(dict.fromkeys(one.task for one in results), key=lambda task: task != AVERAGE)
    n_columns = min(_COLUMNS, len(tasks))
    n_rows = math.ceil(len(tasks) / n_columns)
    figure = Figure(figsize=(_PANEL[0] * n_columns, _PANEL[1] * n_rows + 0.8), layout="constrained")
    panels = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for panel, task in zip(panels, tasks, strict=False):
        _draw_task(panel, [one for one in results if one.task == task], task)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    # Names are the user's own: a "$" in one begins no formula.
    figure.suptitle(title, fontsize=11, parse_math=False)
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=8)
    # Without these, an SVG of the same figures differs from one run to the next.
    with matplotlib.rc_context({"svg.hashsalt": "sparsevlm"}):
        for file in files:
            figure.savefig(file, dpi=130, metadata={"Date": None} if file.suffix == ".svg" else None)


def _draw_task(panel: Axes, results: Sequence[Result], task: str) -> None:
    selectors = list(dict.fromkeys(one.selector for one in results if one.selector != DENSE))
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, selector in enumerate(selectors):
        points = _points([one for one in results if one.selector == selector])
        if not points:
            continue
        tokens, kept, low, high = (list(values) for values in zip(*points, strict=True))
        below = [max(0.0, value - end) for value, end in zip(kept, low, strict=True)]
        above = [max(0.0, end - value) for value, end in zip(kept, high, strict=True)]
        panel.errorbar(
            tokens,
            kept,
            yerr=[below, above],
            label=selector,
            color=_BASELINES.get(selector, colours[number % len(colours)]),
            linestyle="--" if selector in _BASELINES else "-",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.2,
            capsize=2,
        )
    panel.axhline(100, color="black", linewidth=0.8, linestyle=":")
    panel.set_title(task, fontsize=9, parse_math=False)
    panel.set_xlabel("visual tokens, averaged over the layers", fontsize=8)
    panel.set_ylabel("retained % of dense", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.25)


def _points(results: Sequence[Result]) -> list[tuple[float, float, float, float]]:
    """(tokens, retained, low, high), by tokens; where there are several seeds, only their mean."""
    pooled = [one for one in results if "+" in one.seed] or list(results)
    found = [(one.avg_tokens, one.retained, one.ci_low, one.ci_high) for one in pooled]
    return sorted(point for point in found if not (math.isnan(point[0]) or math.isnan(point[1])))
