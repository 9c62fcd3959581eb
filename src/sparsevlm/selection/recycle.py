"""Token recycling: the best of the dropped tokens, merged into a few (paper, token recycling)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.clusters import nearest_centres, spread_clusters, unit_rows
from ..kernels.density_peaks import centred_points, log_densities, peak_scores
from ..kernels.places import indices_of
from .places import highest
from .similarity import row_chunks


def count_clusters(n_dropped: int, tau: float, theta: float) -> tuple[int, int]:
    """Number of recycled tokens L_r = ⌊τN⌋ and of clusters C = ⌊θL_r⌋ for N dropped ones (paper, token recycling)."""
    n_recycled = int(tau * n_dropped + 1e-9)
    return n_recycled, int(theta * n_recycled + 1e-9)


def is_density_peak(hidden_states: Tensor, valid: Tensor, n_clusters: Tensor, most: int) -> Tensor:
    """Mask of cluster centres by density peaks (paper, token aggregation), of several samples filled up to one size.

    ``ρ_i = exp(−1/k Σ_{kNN} d_ij²)``, ``δ_i`` the distance to the nearest denser token (for the densest, to the
    farthest), with k = ``n_clusters`` neighbours and ``d_ij = ‖h_i − h_j‖ / √hidden_size``. The centres have the
    largest ρδ, compared as log ρ + log δ so that nothing underflows; ties go to the lower index. Distances come from
    products of the centred states, in chunks of rows; what rounding leaves of none is none. Nothing is waited for.

    Parameters
    ----------
    hidden_states : Tensor of shape (batch, n, hidden_size)
    valid : Tensor of shape (batch, n), bool
        False for rows that only fill a sample up, behind the others.
    n_clusters : Tensor of shape (batch,), int64
        At most ``most``.
    most : int

    Returns
    -------
    Tensor of shape (batch, n), bool
    """
    points, squares = centred_points(hidden_states, valid)
    batch, n, _ = points.shape
    chunks = row_chunks(n, batch * n)
    whole = points @ points.mT if len(chunks) == 1 else None

    def of_all(function: Callable[[Tensor, int], Tensor]) -> Tensor:
        if whole is not None:
            return function(whole, 0)
        return torch.cat([function(points[:, rows] @ points.mT, rows.start) for rows in chunks], dim=1)

    log_density = of_all(lambda products, first: log_densities(products, squares, valid, n_clusters, most, first))
    scores = of_all(lambda products, first: peak_scores(products, squares, valid, log_density, first))
    return highest(scores, valid, n_clusters)


def assign_to_centres(hidden_states: Tensor, is_centre: Tensor, most: int) -> Tensor:
    """Centre (as an index into the rows) nearest to each row by cosine; a centre belongs to itself.

    Parameters
    ----------
    hidden_states : Tensor of shape (batch, n, hidden_size)
    is_centre : Tensor of shape (batch, n), bool
        At most ``most`` of a sample.
    most : int

    Returns
    -------
    Tensor of shape (batch, n), int64
        ``cluster_idx``.
    """
    centres = indices_of(is_centre, most)
    unit, own = unit_rows(hidden_states, centres)
    return nearest_centres(unit @ own.mT, centres, is_centre)


@dataclass(frozen=True)
class Recycled:
    """Merge plan for dropped tokens of several samples.

    Attributes
    ----------
    is_centre : Tensor of shape (batch, n_visual), bool
        Rows that stand for a cluster.
    target : Tensor of shape (batch, n_visual), int64
        Centre that each row is merged into; -1: none.
    weight : Tensor of shape (batch, n_visual), float32
    """

    is_centre: Tensor
    target: Tensor
    weight: Tensor


def recycle(
    hidden_states: Tensor, is_member: Tensor, n_clusters: Tensor, most_members: int, most_clusters: int, merge: str
) -> Recycled:
    """Cluster recycled tokens around some of themselves; waits for nothing.

    With ``merge="mean"`` a cluster's weights sum to 1, so the size-weighted sum of merged states equals the sum of
    their members'; with ``"sum"`` every weight is 1 and the plain sum is conserved.

    Parameters
    ----------
    hidden_states : Tensor of shape (batch, n_visual, hidden_size)
    is_member : Tensor of shape (batch, n_visual), bool
        Recycled tokens, at most ``most_members`` of a sample.
    n_clusters : Tensor of shape (batch,), int64
        At most ``most_clusters``; 0: nothing of the sample is merged.
    most_members, most_clusters : int
    merge : {"mean", "sum"}
    """
    members = indices_of(is_member, most_members)
    valid = torch.arange(most_members, device=members.device) < is_member.sum(dim=1, keepdim=True)
    valid &= n_clusters[:, None] > 0
    states = hidden_states.gather(1, members[..., None].expand(-1, -1, hidden_states.shape[-1]))
    is_centre = is_density_peak(states, valid, n_clusters, most_clusters)
    cluster_idx = assign_to_centres(states, is_centre, most_clusters)
    return Recycled(*spread_clusters(members, valid, is_centre, cluster_idx, is_member.shape[1], merge))


def merge_hidden_states(hidden_states: Tensor, keep_idx: Tensor, merge_target: Tensor, weight: Tensor) -> Tensor:
    """Apply a merge: ``h'[j] = Σ_{i: merge_target[i] = j} weight[i] h[i]`` for the kept rows j.

    A row that only keeps itself with weight 1 passes bit for bit.

    Parameters
    ----------
    hidden_states : Tensor of shape (n_visual, hidden_size)
    keep_idx : Tensor of shape (n_keep,), int64
    merge_target : Tensor of shape (n_visual,), int64
    weight : Tensor of shape (n_visual,), float32

    Returns
    -------
    Tensor of shape (n_keep, hidden_size)
        In the dtype of ``hidden_states``; sums are taken in float32.
    """
    moving = (merge_target >= 0) & (merge_target != torch.arange(merge_target.shape[0], device=merge_target.device))
    kept = hidden_states[keep_idx]
    changed = torch.zeros_like(merge_target, dtype=torch.bool)
    changed[merge_target[moving]] = True
    changed |= (merge_target >= 0) & ~moving & (weight != 1.0)
    rows = changed[keep_idx]
    if not bool(rows.any()):
        return kept
    sources = (merge_target >= 0).nonzero().squeeze(-1)
    sums = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    sums.index_add_(0, merge_target[sources], hidden_states[sources].float() * weight[sources, None])
    return torch.where(rows[:, None], sums[keep_idx].to(hidden_states.dtype), kept)
