"""Token recycling: the best of the dropped tokens, merged into a few (paper, token recycling)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.places import indices_of
from ..kernels.rank_counts import count_clusters_of
from .places import highest, place_by_score

_CHUNK_ROWS = 512
# Sums of products are exact to about 1e-7 in float32: squared distances below this share of the lengths are none.
_NOISE = 1e-6


def count_clusters(n_dropped: int, tau: float, theta: float) -> tuple[int, int]:
    """Number of recycled tokens L_r = ⌊τN⌋ and of clusters C = ⌊θL_r⌋ for N dropped ones (paper, token recycling)."""
    n_recycled = int(tau * n_dropped + 1e-9)
    return n_recycled, int(theta * n_recycled + 1e-9)


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
    points, squares = _centred(hidden_states, valid)
    n = points.shape[1]
    k = torch.minimum(n_clusters, valid.sum(dim=1) - 1).clamp_min(1)
    most_near = max(1, min(most, n - 1))
    near = torch.arange(most_near, device=k.device) < k[:, None]
    log_density = points.new_full(valid.shape, -torch.inf)
    for rows in _chunks(n) if n > 1 else ():
        distances = _squared_distances(points, squares, rows).masked_fill_(~valid[:, None], torch.inf)
        nearest = distances.topk(most_near + 1, dim=-1, largest=False).values[..., 1:]
        log_density[:, rows] = -torch.where(near[:, None], nearest, 0.0).sum(dim=-1) / k[:, None]
    # Rank 0 is the densest; the stable sort breaks ties by index, so that "denser" is a strict order.
    place = place_by_score(log_density, valid)
    separation = torch.empty_like(log_density)
    for rows in _chunks(n):
        distances = _squared_distances(points, squares, rows)
        denser = (place[:, None, :] < place[:, rows, None]) & valid[:, None]
        nearest = distances.masked_fill(~denser, torch.inf).amin(dim=-1)
        farthest = distances.masked_fill(~valid[:, None], 0.0).amax(dim=-1)
        separation[:, rows] = torch.where(place[:, rows] == 0, farthest, nearest)
    return highest(log_density + 0.5 * separation.log(), valid, n_clusters) & valid


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
    unit = torch.nn.functional.normalize(hidden_states.float(), dim=-1)
    centres = indices_of(is_centre, most)
    counts = torch.arange(most, device=centres.device) < is_centre.sum(dim=1, keepdim=True)
    similarity = unit @ unit.gather(1, centres[..., None].expand(-1, -1, unit.shape[-1])).mT
    nearest = similarity.masked_fill_(~counts[:, None], -torch.inf).argmax(dim=-1)
    itself = torch.arange(unit.shape[1], device=centres.device)
    return torch.where(is_centre, itself, centres.gather(1, nearest))


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
    weight = valid.float()
    if merge == "mean":
        sizes = torch.zeros_like(weight).scatter_add_(1, cluster_idx, weight)
        weight = 1.0 / sizes.gather(1, cluster_idx).clamp_min(1.0)
    n = is_member.shape[1]
    places = torch.where(valid, members, n)  # what fills up is written behind the end

    def spread(values: Tensor, filler: float) -> Tensor:
        return values.new_full((values.shape[0], n + 1), filler).scatter_(1, places, values)[:, :n]

    return Recycled(spread(is_centre, False), spread(members.gather(1, cluster_idx), -1), spread(weight, 0.0))


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


def _centred(hidden_states: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """States minus their mean over √hidden_size, and their squared lengths; 0 where a row only fills up."""
    states = torch.where(valid[..., None], hidden_states.float(), 0.0)
    mean = states.sum(dim=1, keepdim=True) / valid.sum(dim=1).clamp_min(1)[:, None, None]
    points = torch.where(valid[..., None], states - mean, 0.0) / hidden_states.shape[-1] ** 0.5
    return points, points.square().sum(dim=-1)


def _squared_distances(points: Tensor, squares: Tensor, rows: slice) -> Tensor:
    """Squared distances of some rows to all, exactly zero on the diagonal; (batch, n_rows, n)."""
    lengths = squares[:, rows, None] + squares[:, None]
    distances = lengths - 2.0 * (points[:, rows] @ points.mT)
    distances.masked_fill_(distances <= _NOISE * lengths, 0.0)
    columns = torch.arange(points.shape[1], device=points.device)
    return distances.masked_fill_(columns[rows, None] == columns, 0.0)


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK_ROWS, n)) for start in range(0, n, _CHUNK_ROWS)]
