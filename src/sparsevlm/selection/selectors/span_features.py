"""Span before the decoder: the features that the others are combinations of, and how many these are.

Our own. The search of :mod:`.span` over the input embeddings of the visual tokens, so that every decoder layer computes
as few of them as the last. Behind the first layers, the same average would leave fewer to the layers that read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...config import check_unit_interval
from ...kernels.centre import centre
from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import n_spanning
from ..padded import PaddedContext, PaddedSelection
from .span import SpanSelector, weighed_picks


@dataclass(frozen=True)
class SpanFeaturesSelector(SpanSelector):
    """Greedy ``argmax_i ‖x_i − P_S x_i‖²`` with ``x_i = f_i − mean f``, f the features, P_S the projection on the span
    of the picks.

    Without a budget it picks until ``‖x_i − P_S x_i‖² <= unexplained · mean_j ‖x_j‖²`` for every token i: of a picture
    that is full there are more of them, of an empty one fewer.

    Parameters
    ----------
    unexplained : float
        Squared length that the picks may leave of any token, relative to the mean; in [0, 1].
    most : float
        Share of the tokens that is kept at most, in [0, 1].
    """

    name = "span-features"
    placement = BEFORE_DECODER
    needs: ClassVar[frozenset[str]] = frozenset()
    default_schedule = "single"
    unexplained: float = 0.06
    most: float = 0.5

    def __post_init__(self) -> None:
        check_unit_interval("unexplained", self.unexplained)
        check_unit_interval("most", self.most)

    def count(self, context: SelectionContext) -> int:
        """How many tokens explain the others, at most the share ``most`` of all."""
        states = context.hidden_states.detach().float()[None]
        most = int(self.most * context.n_visual)
        if most < 1:
            return 0
        valid = torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
        return n_spanning(centre(states, valid)[0], self.unexplained, most)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The choice for several samples filled up to one size."""
        return PaddedSelection(weighed_picks(context, context.valid.float(), 0.0)[1])
