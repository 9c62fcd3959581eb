"""Span, weighed by what the question adds to the attention that a picture gets anyway.

Our own: coverage as in :mod:`.span`, relevance as in :mod:`.priortr`. What the model looks at without a question as
well (borders, sinks, bright spots) counts for nothing. Runs at target layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...config import check_unit_interval
from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..padded import PaddedContext, PaddedSelection, padded_sample, unpadded
from .priortr import gain_of
from .span import weighed_picks


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
        gain = gain_of(context).clamp_min(0.0)
        return PaddedSelection(weighed_picks(context, gain, self.alpha, self.least)[1])
