"""Span, weighed by what the question adds to the attention that a picture gets anyway.

Our own: coverage as in :mod:`.span`, relevance as in :mod:`.priortr`. What the model looks at without a question as
well (borders, sinks, bright spots) counts for nothing. Runs at target layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config import check_unit_interval
from ...kernels.centre import centre
from ...kernels.places import first_picks
from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..greedy import dpp_order, dpp_order_by_gram
from ..padded import PaddedContext, PaddedSelection, padded_sample, unpadded
from .priortr import gain_of


@dataclass(frozen=True)
class SpanPriorSelector:
    """Greedy ``argmax_i r_i² ‖x_i − P_S x_i‖²`` with ``r_i = max(g_i / max g, least)^alpha`` and
    ``g_i`` the score of :class:`~.priortr.PriorTRSelector`.

    Parameters
    ----------
    alpha : float
        Weight of the question, in [0, 1]; 0 is ``span``.
    least : float
        Least relevance of a token, relative to the highest, in [0, 1]: what the question does not ask for still has
        its place in the coverage.
    """

    name = "span-prior"
    placement = TARGET_LAYERS
    needs = frozenset({"last_attention", "prior_attention"})
    default_schedule = "geometric"
    alpha: float = 0.25
    least: float = 1e-3

    def __post_init__(self) -> None:
        check_unit_interval("alpha", self.alpha)
        check_unit_interval("least", self.least)

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Choose ``n_keep`` rows that span the others, those that the question asks for first."""
        return unpadded(self.select_padded(padded_sample(context, n_keep)))

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        valid, gain = context.valid, gain_of(context).clamp_min(0.0)
        relative = gain / gain.amax(dim=-1, keepdim=True).clamp_min(1e-30)
        quality = torch.where(valid, relative.clamp_min(max(self.least, 1e-6)) ** self.alpha, 0.0)
        states = context.hidden_states.detach()
        states = centre(states.clone() if states.dtype == torch.float32 else states, valid)
        if states.is_cuda:
            order = dpp_order_by_gram(states, quality, context.most_kept, True, context.n_picks)
        else:
            order = dpp_order(states, quality, context.most_kept, True)
        return PaddedSelection(first_picks(order, context.n_keep, valid))
