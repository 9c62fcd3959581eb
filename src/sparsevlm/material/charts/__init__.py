"""Charts: bars, lines, pies, groups of bars with a legend."""

from __future__ import annotations

from ..example import Drawing, Request, TaskFamily
from .bars import draw_bars, draw_groups
from .lines import draw_lines
from .pie import draw_pie

_DRAW = {"bars": draw_bars, "lines": draw_lines, "pie": draw_pie, "groups": draw_groups}


def _draw(request: Request) -> Drawing:
    image, questions = _DRAW[request.task](request.rng, request.split)
    return (image,), request.choose(questions)


CHARTS = TaskFamily("charts", tuple(_DRAW), _draw)

__all__ = ["CHARTS", "draw_bars", "draw_groups", "draw_lines", "draw_pie"]
