"""PyramidDrop: drop a share of the visual tokens at several depths, by the attention of the last instruction token.

Source: Xing et al., "PyramidDrop" (CVPR 2025), arXiv 2410.17247, stage-wise dropping with the ratio λ^stage. Runs at
target layers, each being the end of a stage; the counts λ^stage are the geometric schedule of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import TARGET_LAYERS, SelectionContext
from ..padded import PaddedContext, PaddedSelection
from ..places import highest
from ..scoring import top_k


@dataclass(frozen=True)
class PyramidDropSelector:
    """Score ``s_i = mean_h softmax(q_last · k_i)`` at the end of each stage; the highest stay."""

    name = "pyramiddrop"
    placement = TARGET_LAYERS
    needs = frozenset({"last_attention"})
    default_schedule = "geometric"

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose the ``n_keep`` rows with the most attention."""
        assert context.last_attention is not None  # declared in needs
        return top_k(context.last_attention.float(), n_keep)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.last_attention is not None  # declared in needs
        return PaddedSelection(highest(context.last_attention.float(), context.valid, context.n_keep))
