"""V²Drop: keep the tokens that a layer still changes, without reading any attention.

Source: Chen et al., "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models" (CVPR 2026),
arXiv 2509.01552, token variation with the L2 distance. Runs at target layers (the paper: three depths).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import TARGET_LAYERS, SelectionContext
from ..padded import PaddedContext, PaddedSelection
from ..places import highest
from ..scoring import top_k


@dataclass(frozen=True)
class V2DropSelector:
    """Score ``s_i = ‖h_i^l − h_i^{l−1}‖₂``, the change by the target layer l; the largest stay."""

    name = "v2drop"
    placement = TARGET_LAYERS
    needs = frozenset({"previous_hidden_states"})
    default_schedule = "geometric"

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose the ``n_keep`` rows that changed most."""
        assert context.previous_hidden_states is not None  # declared in needs
        return top_k(_change(context.hidden_states, context.previous_hidden_states), n_keep)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.previous_hidden_states is not None  # declared in needs
        change = _change(context.hidden_states, context.previous_hidden_states)
        return PaddedSelection(highest(change, context.valid, context.n_keep))


def _change(states: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    return (states.float() - previous.float()).norm(dim=-1)
