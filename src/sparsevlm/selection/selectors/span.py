"""Span: the tokens that the others are combinations of; and its variant for budgets of a few tokens.

Our own. Greedy volume: each pick is the token of which the picks so far explain the least, the pivots of a QR
decomposition with column pivoting (Businger and Golub 1965) of the tokens at the target layer, centred. Importance and
coverage in one: a token counts by how far it lies from what is common to all, and only by what no pick has said yet.
Runs at target layers. ``docs/ablation.md`` has its measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...config import check_unit_interval
from ...kernels.centre import centre
from ...kernels.places import first_picks, indices_of
from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..greedy import dpp_map, dpp_order, dpp_order_by_gram, gram_pays
from ..padded import PaddedContext, PaddedSelection
from ..similarity import finite, nearest_rows, padded_nearest, unit_rows

_LEAST = 1e-6  # relevance of a token, relative to the highest


@dataclass(frozen=True)
class SpanSelector:
    """Greedy ``argmax_i ‖x_i − P_S x_i‖²`` with ``x_i = h_i − mean h`` and P_S the projection on the span of the picks.

    Where the picks span everything (more picks than dimensions, or copies of tokens), the search starts anew among
    the tokens that are left.
    """

    name = "span"
    placement = TARGET_LAYERS
    needs: ClassVar[frozenset[str]] = frozenset()
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> Tensor:
        """Choose ``n_keep`` rows that span the others."""
        return self.select_batch([context], n_keep)[0]

    def select_batch(self, contexts: Sequence[SelectionContext], n_keep: int) -> Sequence[Tensor]:
        """The same for several samples with as many tokens each, in as many steps as for one."""
        states = torch.stack([context.hidden_states for context in contexts]).detach().float()
        valid = torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device)
        if states.is_cuda and not gram_pays(states):
            order = dpp_order(centre(states, valid), valid.float(), n_keep, True)
        else:
            order = self.order(states, valid, n_keep)
        return order.sort(dim=-1).values.unbind()

    def order(self, states: Tensor, valid: Tensor, n_keep: int, counts: Tensor | None = None) -> Tensor:
        """The search itself: see :class:`~sparsevlm.selection.context.OrderedSelector`.

        On a GPU it works on the products of all rows, in one kernel; states in float32 are overwritten, so that a whole
        batch of them is not held twice.
        """
        centred, quality = centre(states, valid), valid.float()
        if states.is_cuda:
            return dpp_order_by_gram(centred, quality, n_keep, True, counts)
        return dpp_order(centred, quality, n_keep, True)


@dataclass(frozen=True)
class SpanJointSelector:
    """Span, weighed by attention, and with the dropped tokens merged into the kept: ``argmax_i r_i² ‖x_i − P_S x_i‖²``.

    ``r_i = max(a_i / max a, 10⁻⁶)^α``, a the attention of the prompt's last token. With ``recycle``, every dropped
    token joins the kept one that is nearest by the cosine of the centred states, if that is at least ``nearest``.

    Parameters
    ----------
    alpha : float
        α, the weight of the attention, in [0, 1].
    nearest : float
        Least cosine of a token that joins another, in [0, 1].
    """

    name = "span-joint"
    placement = TARGET_LAYERS
    needs = frozenset({"last_attention"})
    default_schedule = "geometric"
    reads = frozenset({"recycle", "merge"})
    alpha: float = 0.1
    nearest: float = 0.5

    def __post_init__(self) -> None:
        check_unit_interval("alpha", self.alpha)
        check_unit_interval("nearest", self.nearest)

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Choose ``n_keep`` rows and merge others into them."""
        return self.select_batch([context], n_keep)[0]

    def select_batch(self, contexts: Sequence[SelectionContext], n_keep: int) -> Sequence[Selection]:
        """The same for several samples with as many tokens each, the choice in as many steps as for one."""
        states = finite(torch.stack([context.hidden_states for context in contexts]))
        states = centre(states, torch.ones(states.shape[:-1], dtype=torch.bool, device=states.device))
        attention = finite(torch.stack([_last_attention(context) for context in contexts]))
        relative = attention / attention.amax(dim=-1, keepdim=True).clamp_min(1e-30)
        quality = relative.clamp_min(_LEAST) ** self.alpha  # a token that nobody looks at still has its place
        kept = dpp_map(states, quality, n_keep, rounds=True)
        return [self._merged(*one) for one in zip(contexts, states, kept, strict=True)]

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.last_attention is not None  # declared in needs
        valid = context.valid
        states, is_kept = weighed_picks(context, context.last_attention.float(), self.alpha)
        if not context.config.recycle:
            return PaddedSelection(is_kept)
        target = self._joined(states, valid, is_kept, context.most_kept)
        weight = (target >= 0).float()
        if context.config.merge == "mean":
            sizes = torch.zeros_like(weight).scatter_add_(1, target.clamp_min(0), weight)
            weight = weight / sizes.gather(1, target.clamp_min(0)).clamp_min(1.0)
        return PaddedSelection(is_kept, target, weight)

    def _joined(self, states: Tensor, valid: Tensor, is_kept: Tensor, most_kept: int) -> Tensor:
        """Kept row that each row joins, itself for a kept one, -1 for none, (batch, n_visual)."""
        unit = torch.nn.functional.normalize(states, dim=-1)
        kept = indices_of(is_kept, most_kept)
        counts = torch.arange(most_kept, device=kept.device) < is_kept.sum(dim=1, keepdim=True)
        targets = unit.gather(1, kept[..., None].expand(-1, -1, unit.shape[-1]))
        cosine, nearest = padded_nearest(unit, targets, counts)
        joins = torch.where((cosine >= self.nearest) & valid, kept.gather(1, nearest), -1)
        return torch.where(is_kept, torch.arange(unit.shape[1], device=kept.device), joins)

    def _merged(self, context: SelectionContext, states: Tensor, kept: Tensor) -> Selection:
        if not context.config.recycle:
            return Selection(kept)
        unit = unit_rows(states)
        cosine, nearest = nearest_rows(unit, unit[kept])
        merge_target = torch.where(cosine >= self.nearest, kept[nearest], -1)
        merge_target[kept] = kept
        joined = merge_target >= 0
        weight = joined.float()
        if context.config.merge == "mean":
            sizes = torch.zeros_like(weight).index_add_(0, merge_target.clamp_min(0), weight)
            weight = weight / sizes[merge_target.clamp_min(0)].clamp_min(1.0)
        return Selection(kept, merge_target, weight)


def weighed_picks(
    context: PaddedContext, relevance: Tensor, alpha: float, least: float = _LEAST
) -> tuple[Tensor, Tensor]:
    """Span's search, weighed by ``max(relevance / max relevance, least)^alpha``.

    Parameters
    ----------
    context : PaddedContext
    relevance : Tensor of shape (batch, n_visual), float32
        Not negative.
    alpha, least : float

    Returns
    -------
    states : Tensor of shape (batch, n_visual, hidden_size), float32
        Centred.
    is_kept : Tensor of shape (batch, n_visual), bool
    """
    valid, states = context.valid, centre(_own(context.hidden_states.detach()), context.valid)
    relative = relevance / relevance.amax(dim=-1, keepdim=True).clamp_min(1e-30)
    quality = torch.where(valid, relative.clamp_min(max(least, _LEAST)) ** alpha, 0.0)
    if states.is_cuda:
        order = dpp_order_by_gram(states, quality, context.most_kept, True, context.n_picks)
    else:
        order = dpp_order(states, quality, context.most_kept, True)
    return states, first_picks(order, context.n_keep, valid)


def _own(states: Tensor) -> Tensor:
    """What may be overwritten: centring leaves other states than those of float32 as they are."""
    return states.clone() if states.dtype == torch.float32 else states


def _last_attention(context: SelectionContext) -> Tensor:
    assert context.last_attention is not None  # declared in needs
    return context.last_attention
