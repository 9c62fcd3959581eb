"""The rank rule of several samples, without waiting for their ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import use_triton


@dataclass(frozen=True)
class RankRule:
    """How ranks decide.

    Attributes
    ----------
    rank_lambda : float
        Share of the tokens beyond the rank that are dropped.
    tau, theta : float
        Of clusters, see :func:`count_clusters_of`.
    recycles : bool
        Whether there are clusters.
    min_keep : int
    """

    rank_lambda: float
    tau: float
    theta: float
    recycles: bool
    min_keep: int


def rank_counts(
    n_visual: Tensor, ranks: Tensor, most: int, rule: RankRule, is_faulty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Most tokens that the rank lets be dropped, and what is left then.

    Parameters
    ----------
    n_visual, ranks : Tensor of shape (batch,), int64
        A rank below 0 is none, and counts as 0.
    most : int
        No sample has more visual tokens.
    rule : RankRule
    is_faulty : Tensor of shape (1,), bool, optional
        Becomes True where a rank is none.

    Returns
    -------
    n_keep, n_clusters : Tensor of shape (batch,), int64
        All, and none, of samples that have no more than ``min_keep``, or where nothing would be dropped.
    """
    if use_triton(n_visual):
        from .triton.rank_counts import rank_counts as triton_version

        return triton_version(n_visual, ranks, most, rule, is_faulty)
    return rank_counts_reference(n_visual, ranks, most, rule, is_faulty)


def rank_counts_reference(
    n_visual: Tensor, ranks: Tensor, most: int, rule: RankRule, is_faulty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    if is_faulty is not None:
        is_faulty |= (ranks < 0).any()
    theirs = (rule.rank_lambda * (n_visual - ranks.clamp_min(0)).double() + 1e-9).long().clamp_min(0)
    n_dropped = torch.arange(most + 1, device=n_visual.device)
    n_clusters = torch.zeros_like(n_dropped)
    if rule.recycles:
        n_clusters = count_clusters_of(n_dropped, rule.tau, rule.theta)[1]
    n_left = n_visual[:, None] - n_dropped + n_clusters
    fits = (n_dropped <= theirs[:, None]) & ((n_left >= rule.min_keep) | (n_dropped == 0))
    chosen = torch.where(fits, n_dropped, 0).amax(dim=1)
    n_clusters = n_clusters[chosen]
    n_keep = n_visual - chosen + n_clusters
    is_whole = (n_visual <= rule.min_keep) | (n_keep >= n_visual)
    return torch.where(is_whole, n_visual, n_keep), torch.where(is_whole, 0, n_clusters)


def count_clusters_of(n_dropped: Tensor, tau: float, theta: float) -> tuple[Tensor, Tensor]:
    """Recycled tokens L_r = ⌊τN⌋ and clusters C = ⌊θL_r⌋ for some numbers N of dropped ones, int64."""
    n_recycled = (tau * n_dropped.double() + 1e-9).long()
    return n_recycled, (theta * n_recycled.double() + 1e-9).long()
