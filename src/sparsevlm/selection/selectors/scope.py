"""SCOPE: salient tokens that together cover all the others.

Source: Deng et al., "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs" (NeurIPS 2025),
arXiv 2510.24214, token-coverage gain and SCOPE score. Runs before the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config import check_above_zero
from ...kernels.places import first_picks
from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import cover, cover_padded
from ..padded import PaddedContext, PaddedSelection
from ..similarity import finite, padded_unit_rows, unit_rows


@dataclass(frozen=True)
class ScopeSelector:
    """Greedy on ``a_i^α · Σ_u max(0, cos(x_u, x_i) − cur_u)``, ``cur_u`` the best cosine of u to a kept token or 0.

    The saliency a is the attention that a token receives in the vision tower's last block.

    Parameters
    ----------
    alpha : float
        α, above 0; the authors' by default.
    """

    name = "scope"
    placement = BEFORE_DECODER
    needs = frozenset({"features", "vision_attention"})
    default_schedule = "single"
    most_padded = 1 << 13  # of which all values are held
    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_above_zero("alpha", self.alpha)

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose ``n_keep`` salient rows that cover the others."""
        assert context.features is not None  # declared in needs
        assert context.vision_attention is not None
        unit, saliency = unit_rows(context.features), finite(context.vision_attention[1])
        return cover(unit, unit, n_keep, factor=saliency**self.alpha)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.vision_attention is not None  # declared in needs
        unit, valid = padded_unit_rows(context.hidden_states, context.valid), context.valid
        factor = torch.where(valid, context.vision_attention[:, 1].float() ** self.alpha, 0.0)
        order = cover_padded(unit, unit, valid, context.most_kept, factor=factor)
        return PaddedSelection(first_picks(order, context.n_keep, valid))
