"""Even spacing over the visual tokens: coverage without looking. Runs at target layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..context import TARGET_LAYERS, SelectionContext
from ..image_floor import evenly_spaced
from ..padded import PaddedContext, PaddedSelection


@dataclass(frozen=True)
class GridSelector:
    """Rows ⌊(i + ½) n_visual / n_keep⌋ of the reading order."""

    name = "grid"
    placement = TARGET_LAYERS
    needs: ClassVar[frozenset[str]] = frozenset()
    default_schedule = "geometric"

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Take ``n_keep`` evenly spaced rows."""
        steps = torch.arange(n_keep, device=context.hidden_states.device)
        return ((2 * steps + 1) * context.n_visual) // (2 * n_keep)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        place = torch.arange(context.valid.shape[1], device=context.valid.device)
        chosen = evenly_spaced(place, context.n_visual[:, None], context.n_keep[:, None])
        return PaddedSelection(chosen & context.valid)
