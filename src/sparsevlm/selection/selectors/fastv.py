"""FastV: after an early layer, keep what the last token of the prompt attends to.

Source: Chen et al., "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024), arXiv 2403.06764, re-ranking and
filtering module. Runs at target layers: one cut after the first of them (the paper: after layer 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import TARGET_LAYERS, SelectionContext
from ..padded import PaddedContext, PaddedSelection
from ..places import highest
from ..scoring import top_k


@dataclass(frozen=True)
class FastVSelector:
    """Score ``s_i = mean_h A_h[last, i]``, the attention of the prompt's last token; the highest stay."""

    name = "fastv"
    placement = TARGET_LAYERS
    needs = frozenset({"last_attention"})
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose the ``n_keep`` rows with the most attention."""
        assert context.last_attention is not None  # declared in needs
        return top_k(context.last_attention.float(), n_keep)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.last_attention is not None  # declared in needs
        return PaddedSelection(highest(context.last_attention.float(), context.valid, context.n_keep))
