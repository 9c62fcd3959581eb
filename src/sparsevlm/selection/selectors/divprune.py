"""DivPrune: the subset whose two most similar tokens are as different as possible.

Source: Alvar et al., "DivPrune" (CVPR 2025), arXiv 2503.02175, max-min diversity problem and its greedy algorithm.
Runs before the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.places import first_picks
from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import farthest_points, farthest_points_padded
from ..padded import PaddedContext, PaddedSelection
from ..similarity import padded_unit_rows, unit_rows


@dataclass(frozen=True)
class DivPruneSelector:
    """``argmax_i min_{j∈S} d_ij``, ``d_ij = 1 − cos(x_i, x_j)``, from the token farthest from its nearest neighbour."""

    name = "divprune"
    placement = BEFORE_DECODER
    needs = frozenset({"features"})
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose ``n_keep`` rows that are far from each other."""
        assert context.features is not None  # declared in needs
        return farthest_points(unit_rows(context.features), n_keep)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        unit, valid = padded_unit_rows(context.hidden_states, context.valid), context.valid
        order = farthest_points_padded(unit, valid, context.most_kept)
        return PaddedSelection(first_picks(order, context.n_keep, valid))
