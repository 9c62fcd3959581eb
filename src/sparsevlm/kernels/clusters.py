"""Clusters of recycled tokens of several samples filled up to one size, without waiting for their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def unit_rows(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length 1, and some of them once more; a zero row stays zero.

    Parameters
    ----------
    states : Tensor of shape (batch, n, hidden_size)
    chosen : Tensor of shape (batch, most), int64

    Returns
    -------
    unit : Tensor of the shape of ``states``, float32
    own : Tensor of shape (batch, most, hidden_size), float32
    """
    if use_triton(states):
        from .triton.clusters import unit_rows as triton_version

        return triton_version(states, chosen)
    return unit_rows_reference(states, chosen)


def unit_rows_reference(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    return unit, unit.gather(1, chosen[..., None].expand(-1, -1, unit.shape[-1]))


def nearest_centres(similarity: Tensor, centres: Tensor, is_centre: Tensor) -> Tensor:
    """The most similar centre of every row, ties to the lower; a centre belongs to itself.

    Parameters
    ----------
    similarity : Tensor of shape (batch, n, most), float32
        NaN is the most similar.
    centres : Tensor of shape (batch, most), int64
        Ascending, as many as ``is_centre`` has; what is behind them does not count.
    is_centre : Tensor of shape (batch, n), bool

    Returns
    -------
    Tensor of shape (batch, n), int64
        The first of ``centres`` in samples that have none.
    """
    if use_triton(similarity):
        from .triton.clusters import nearest_centres as triton_version

        return triton_version(similarity, centres, is_centre)
    return nearest_centres_reference(similarity, centres, is_centre)


def nearest_centres_reference(similarity: Tensor, centres: Tensor, is_centre: Tensor) -> Tensor:
    """Reference in plain torch."""
    counts = torch.arange(centres.shape[1], device=centres.device) < is_centre.sum(dim=1, keepdim=True)
    nearest = similarity.masked_fill(~counts[:, None], -torch.inf).argmax(dim=-1)
    itself = torch.arange(is_centre.shape[1], device=centres.device)
    return torch.where(is_centre, itself, centres.gather(1, nearest))


def spread_clusters(
    members: Tensor, valid: Tensor, is_centre: Tensor, cluster_idx: Tensor, n: int, merge: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of some tokens of every sample as a merge plan for all of them.

    Parameters
    ----------
    members : Tensor of shape (batch, most), int64
        These tokens.
    valid : Tensor of shape (batch, most), bool
        False where there is no token.
    is_centre : Tensor of shape (batch, most), bool
    cluster_idx : Tensor of shape (batch, most), int64
        Centre of each, as an index into the members.
    n : int
        Tokens of a sample.
    merge : {"mean", "sum"}

    Returns
    -------
    is_centre : Tensor of shape (batch, n), bool
    target : Tensor of shape (batch, n), int64
        -1 for a token that is no member.
    weight : Tensor of shape (batch, n), float32
        One over the size of the cluster, or 1; 0 for a token that is no member.
    """
    if use_triton(members):
        from .triton.clusters import spread_clusters as triton_version

        return triton_version(members, valid, is_centre, cluster_idx, n, merge)
    return spread_clusters_reference(members, valid, is_centre, cluster_idx, n, merge)


def spread_clusters_reference(
    members: Tensor, valid: Tensor, is_centre: Tensor, cluster_idx: Tensor, n: int, merge: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference in plain torch."""
    weight = valid.float()
    if merge == "mean":
        sizes = torch.zeros_like(weight).scatter_add_(1, cluster_idx, weight)
        weight = 1.0 / sizes.gather(1, cluster_idx).clamp_min(1.0)
    places = torch.where(valid, members, n)  # what fills up is written behind the end

    def spread(values: Tensor, filler: float) -> Tensor:
        return values.new_full((values.shape[0], n + 1), filler).scatter_(1, places, values)[:, :n]

    return spread(is_centre, False), spread(members.gather(1, cluster_idx), -1), spread(weight, 0.0)
