"""Documents: pages of running text, forms, receipts, tables, headings to read."""

from __future__ import annotations

from ..example import Drawing, Request, TaskFamily
from .form import draw_form
from .page import draw_page, draw_reading
from .receipt import draw_receipt
from .table import draw_table

_DRAW = {
    "page": draw_page,
    "form": draw_form,
    "receipt": draw_receipt,
    "table": draw_table,
    "read": draw_reading,
}


def _draw(request: Request) -> Drawing:
    image, questions = _DRAW[request.task](request.rng, request.split)
    return (image,), request.choose(questions)


DOCUMENTS = TaskFamily("documents", tuple(_DRAW), _draw, max_new_tokens=48, read=frozenset(_DRAW))

__all__ = ["DOCUMENTS", "draw_form", "draw_page", "draw_reading", "draw_receipt", "draw_table"]
