"""Selection over packed rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..runtime.pruner import record_decisions, record_without_visual
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
    sample, needs = request.samples[b], request.traits.needs
    positions, coordinates = sample.positions, request.coordinates
    rows = packed.local(b, positions)
    features = None if request.features is None else request.features[b]
    return SelectionContext(
        layer=target,
        sample=b,
        config=request.config,
        hidden_states=packed.hidden[rows],
        coordinates=positions.expand(3, -1) if coordinates is None else coordinates[:, b][:, positions],
        indices=sample.alive.clone(),
        features=features[positions] if features is not None and "features" in needs else None,
        text_features=features[sample.text] if features is not None and "text_features" in needs else None,
        previous_hidden_states=previous[rows] if "previous_hidden_states" in needs and target >= 0 else None,
    )
