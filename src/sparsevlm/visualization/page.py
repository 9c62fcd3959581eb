"""A page of captioned pictures, laid out from top to bottom."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

_INK, _FAINT = "#1f2430", "#667085"
_DPI = 110
_MOST_LINES, _MOST_OF_CAPTION = 6, 4


class Panel(NamedTuple):
    """One picture with its name and counts."""

    name: str
    counts: str
    pixels: np.ndarray


@dataclass(frozen=True)
class _Cell:
    """A panel at its place; lengths in inches from the top left corner."""

    left: float
    top: float
    width: float
    height: float
    panel: Panel
    caption: str
    caption_height: float


class Page:
    """A page that is filled from top to bottom and sized when it is full; lengths in inches.

    Parameters
    ----------
    width : float
        Without the margins.
    """

    _MARGIN = 0.15
    _NAME = 0.2
    _LINE = 0.125

    def __init__(self, width: float) -> None:
        self._width = width
        self._used = self._MARGIN
        self._texts: list[tuple[float, str, float, str]] = []
        self._cells: list[_Cell] = []

    def write(self, text: str, size: float) -> None:
        """Write a paragraph, its first line bold; nothing for an empty text."""
        per_line = int(self._width * 110 / size)
        lines = [
            (piece, "normal" if number else "bold")
            for number, line in enumerate(text.splitlines())
            for piece in textwrap.wrap(line, per_line)
        ]
        if len(lines) > _MOST_LINES:
            lines = [*lines[: _MOST_LINES - 1], (lines[_MOST_LINES - 1][0] + " …", lines[_MOST_LINES - 1][1])]
        for line, weight in lines:
            self._texts.append((self._used, line, size, weight))
            self._used += size * 0.019
        self._used += 0.06 if lines else 0.0

    def place(self, panels: Sequence[Panel], width: float, height: float) -> None:
        """Put panels side by side, captions above them."""
        wrapped = [textwrap.wrap(panel.counts, int(width * 17))[:_MOST_OF_CAPTION] for panel in panels]
        caption = self._LINE * max(map(len, wrapped)) + 0.04
        top = self._used + self._NAME + caption
        for column, (panel, lines) in enumerate(zip(panels, wrapped, strict=True)):
            place = (column * width, top, width - 0.1, height - 0.1)
            self._cells.append(_Cell(*place, panel, "\n".join(lines), caption))
        self._used = top + height + 0.06

    def figure(self, legend: Sequence[tuple[str, str]], note: str = "") -> Figure:
        """Return the page, with a legend of (colour, text) and a note at its foot."""
        lines = textwrap.wrap(note, int(self._width * 110 / 8))
        total = self._used + 0.3 + 0.2 * len(lines)
        across = self._width + 2 * self._MARGIN
        figure = Figure(figsize=(across, total), dpi=_DPI, facecolor="white")
        margin = self._MARGIN / across
        for down, text, size, weight in self._texts:
            figure.text(
                margin, 1 - down / total, text, va="top", fontsize=size, weight=weight, color=_INK, parse_math=False
            )
        for cell in self._cells:
            self._draw(figure, cell, across, total)
        handles = [Patch(facecolor=colour, edgecolor=_FAINT, label=text) for colour, text in legend]
        figure.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(margin - 0.04 / across, 0.05 / total),
            borderpad=0,
            ncols=len(handles),
            frameon=False,
            fontsize=8,
            labelcolor=_INK,
        )
        foot = "\n".join(lines)
        figure.text(margin, 0.33 / total, foot, va="bottom", fontsize=8, color=_FAINT, parse_math=False)
        return figure

    def _draw(self, figure: Figure, cell: _Cell, across: float, total: float) -> None:
        left, bottom = self._MARGIN + cell.left, total - cell.top - cell.height
        axes = figure.add_axes((left / across, bottom / total, cell.width / across, cell.height / total))
        axes.imshow(cell.panel.pixels, interpolation="antialiased")
        axes.set_anchor("NW")
        axes.set_axis_off()
        captions: tuple[tuple[str, float, dict[str, Any]], ...] = (
            (cell.panel.name, cell.caption_height + self._NAME, {"fontsize": 9, "color": _INK, "weight": "bold"}),
            (cell.caption, cell.caption_height, {"fontsize": 7.5, "color": _FAINT, "linespacing": 1.15}),
        )
        for text, above, style in captions:
            down = cell.top - above
            figure.text(left / across, 1 - down / total, text, va="top", parse_math=False, **style)
