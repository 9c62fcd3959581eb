"""Span before the decoder: the features that the others are combinations of, and how many these are.

Our own. The search of :mod:`.span` over the input embeddings of the visual tokens, so that every decoder layer computes
as few of them as the last. Behind the first layers, the same average would leave fewer to the layers that read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...config import check_unit_interval
from ...kernels.centre import centre
from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import spanning_picks
from .span import SpanSelector


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
    adaptive = True
    unexplained: float = 0.01
    most: float = 0.5

    def __post_init__(self) -> None:
        check_unit_interval("unexplained", self.unexplained)
        check_unit_interval("most", self.most)

    def select_batch(self, contexts: Sequence[SelectionContext], n_keep: int | None) -> Sequence[Tensor]:
        """As span's; without a budget, as many rows of each sample as explain the others."""
        if n_keep is not None:
            return super().select_batch(contexts, n_keep)
        states = pad_sequence([context.hidden_states.detach() for context in contexts], batch_first=True).float()
        sizes = torch.tensor([context.n_visual for context in contexts], device=states.device)
        least = contexts[0].config.min_keep
        order, counts = self.adaptive_order(
            states, torch.arange(states.shape[1], device=states.device) < sizes[:, None], sizes.clamp_max(least), least
        )
        return [own[:count].sort().values for own, count in zip(order, counts.tolist(), strict=True)]

    def adaptive_order(self, states: Tensor, valid: Tensor, least: Tensor, most_least: int) -> tuple[Tensor, Tensor]:
        """The search itself: see :class:`~sparsevlm.selection.context.AdaptiveSelector`."""
        n_valid, n = valid.sum(dim=1), states.shape[1]
        most = torch.maximum((n_valid * self.most).long(), least)
        n_picks = min(n, max(1, int(n * self.most), most_least))
        return spanning_picks(centre(states, valid), n_valid, self.unexplained, least, most, n_picks)
