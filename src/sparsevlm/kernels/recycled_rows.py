"""Which tokens are the best, and which of the others are recycled, without waiting for their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton
from .rank_counts import count_clusters_of


def recycled_rows(
    place: Tensor, n_visual: Tensor, n_keep: Tensor, n_clusters: Tensor | None, most_kept: int, tau: float, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens by their place: first the best ones, that stay as they are, then the recycled.

    Parameters
    ----------
    place : Tensor of shape (batch, n), int64
        Of every token in the order of the scores.
    n_visual, n_keep : Tensor of shape (batch,), int64
        Tokens before and after, clusters among the latter.
    n_clusters : Tensor of shape (batch,), int64, optional
        ``None``: :func:`clusters_within`.
    most_kept : int
        Bound of ``n_keep``.
    tau, theta : float
        See :func:`~sparsevlm.kernels.rank_counts.count_clusters_of`.

    Returns
    -------
    is_best, is_member : Tensor of shape (batch, n), bool
    n_clusters : Tensor of shape (batch,), int64
    """
    if use_triton(place):
        from .triton.recycled_rows import recycled_rows as triton_version

        return triton_version(place, n_visual, n_keep, n_clusters, most_kept, tau, theta)
    return recycled_rows_reference(place, n_visual, n_keep, n_clusters, most_kept, tau, theta)


def recycled_rows_reference(
    place: Tensor, n_visual: Tensor, n_keep: Tensor, n_clusters: Tensor | None, most_kept: int, tau: float, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference in plain torch."""
    if n_clusters is None:
        n_clusters = clusters_within(n_visual, n_keep, most_kept, tau, theta)
    n_best = n_keep - n_clusters
    n_recycled = torch.maximum(count_clusters_of(n_visual - n_best, tau, theta)[0], n_clusters)
    is_best = place < n_best[:, None]
    return is_best, ~is_best & (place < (n_best + n_recycled)[:, None]), n_clusters


def clusters_within(n_visual: Tensor, n_out: Tensor, most_out: int, tau: float, theta: float) -> Tensor:
    """Clusters that fit in outputs of ``n_out`` tokens, themselves included; waits for nothing.

    The largest C ≤ ``n_out`` / 4 with C ≤ ⌊θ⌊τN⌋⌋, where N = ``n_visual`` − ``n_out`` + C tokens are dropped.

    Parameters
    ----------
    n_visual, n_out : Tensor of shape (batch,), int64
        ``n_out`` is at most ``most_out``.
    most_out : int
    tau, theta : float

    Returns
    -------
    Tensor of shape (batch,), int64
    """
    n_clusters = torch.arange(most_out // 4 + 1, device=n_out.device)
    n_dropped = (n_visual - n_out)[:, None] + n_clusters
    fits = (n_clusters <= n_out[:, None] // 4) & (count_clusters_of(n_dropped, tau, theta)[1] >= n_clusters)
    return torch.where(fits, n_clusters, 0).amax(dim=1)
