"""Selection over packed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..runtime.pruner import record_decisions, record_without_visual
from ..runtime.reading import make_context
from ..runtime.request import Request
from ..selection.context import Selection, SelectionContext

if TYPE_CHECKING:
    from .prefill import Packed

# What the engine can give a selector; others run on the plain path.
PROVIDED = frozenset({"features", "text_features", "previous_hidden_states"})


def select(request: Request, packed: Packed, target: int, previous: Tensor) -> list[Selection | None]:
    """Selections of all samples at a target layer, recorded."""
    with_visual = [b for b, sample in enumerate(request.samples) if sample.alive.shape[0]]
    contexts = [_context(request, packed, b, target, previous) for b in with_visual]
    found = record_decisions(request, target, with_visual, contexts, [None] * len(with_visual))
    record_without_visual(request, target)
    selections: list[Selection | None] = [None] * len(request.samples)
    for b, selection in zip(with_visual, found, strict=True):
        selections[b] = selection
    return selections


def _context(request: Request, packed: Packed, b: int, target: int, previous: Tensor) -> SelectionContext:
    rows = packed.local(b, request.samples[b].positions)
    wants_previous = "previous_hidden_states" in request.traits.needs and target >= 0
    before = previous[rows] if wants_previous else None
    return make_context(request, b, target, packed.hidden[rows], previous_hidden_states=before)
