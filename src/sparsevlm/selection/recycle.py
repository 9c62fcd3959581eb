"""Token recycling: the best of the dropped tokens, merged into a few (paper, token recycling)."""

from __future__ import annotations

import torch
from torch import Tensor

from .scoring import top_k

_CHUNK_ROWS = 512


def count_clusters(n_dropped: int, tau: float, theta: float) -> tuple[int, int]:
    """Number of recycled tokens L_r = ⌊τN⌋ and of clusters C = ⌊θL_r⌋ for N dropped ones (paper, token recycling)."""
    n_recycled = int(tau * n_dropped + 1e-9)
    return n_recycled, int(theta * n_recycled + 1e-9)


def clusters_within(n_visual: int, n_out: int, tau: float, theta: float) -> int:
    """Clusters that fit in an output of ``n_out`` tokens, themselves included.

    The largest C ≤ ``n_out`` / 4 with C ≤ ⌊θ⌊τN⌋⌋, where N = ``n_visual`` − ``n_out`` + C tokens are dropped.
    """
    n_clusters = n_out // 4
    while n_clusters and count_clusters(n_visual - n_out + n_clusters, tau, theta)[1] < n_clusters:
        n_clusters -= 1
    return n_clusters


def density_peaks(hidden_states: Tensor, n_clusters: int) -> Tensor:
    """Cluster centres by density peaks (paper, token aggregation).

    ``ρ_i = exp(−1/k Σ_{kNN} d_ij²)``, ``δ_i`` the distance to the nearest denser token (for the densest, to the
    farthest), with k = ``n_clusters`` neighbours and ``d_ij = ‖h_i − h_j‖ / √hidden_size``. The centres have the
    largest ρδ, compared as log ρ + log δ so that nothing underflows; ties go to the lower index. Distances are
    computed in chunks of rows.

    Parameters
    ----------
    hidden_states : Tensor of shape (n, hidden_size)
    n_clusters : int
        In [1, n].

    Returns
    -------
    Tensor of shape (n_clusters,), int64
        Sorted indices of the centres.
    """
    points = hidden_states.float() / hidden_states.shape[1] ** 0.5
    n = points.shape[0]
    k = min(n_clusters, n - 1)
    if n <= n_clusters or k == 0:
        return torch.arange(min(n, max(n_clusters, 1)), device=points.device)
    log_density = torch.cat(
        [-_distances(points, rows).topk(k + 1, largest=False).values[:, 1:].square().mean(-1) for rows in _chunks(n)]
    )
    # Rank 0 is the densest; the stable sort breaks ties by index, so that "denser" is a strict order.
    place = torch.empty(n, dtype=torch.long, device=points.device)
    place[torch.sort(log_density, descending=True, stable=True).indices] = torch.arange(n, device=points.device)
    separation = torch.empty_like(log_density)
    for rows in _chunks(n):
        distances = _distances(points, rows)
        denser = place[None, :] < place[rows, None]
        nearest = distances.masked_fill(~denser, torch.inf).amin(dim=-1)
        separation[rows] = torch.where(place[rows] == 0, distances.amax(dim=-1), nearest)
    return top_k(log_density + separation.log(), n_clusters)


def assign_to_centres(hidden_states: Tensor, centres: Tensor) -> Tensor:
    """Centre (as an index into the rows) nearest to each row by cosine; a centre belongs to itself.

    Parameters
    ----------
    hidden_states : Tensor of shape (n, hidden_size)
    centres : Tensor of shape (n_clusters,), int64

    Returns
    -------
    Tensor of shape (n,), int64
        ``cluster_idx``.
    """
    unit = torch.nn.functional.normalize(hidden_states.float(), dim=-1)
    similarity = unit @ unit[centres].T
    cluster_idx = centres[similarity.argmax(dim=-1)]
    cluster_idx[centres] = centres
    return cluster_idx


def recycle(
    hidden_states: Tensor, scores: Tensor, drop_idx: Tensor, n_recycled: int, n_clusters: int, merge: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge plan for the dropped tokens.

    The ``n_recycled`` best-scored of ``drop_idx`` are clustered around ``n_clusters`` of themselves. With
    ``merge="mean"`` a cluster's weights sum to 1, so the size-weighted sum of merged states equals the sum of their
    members'; with ``"sum"`` every weight is 1 and the plain sum is conserved.

    Parameters
    ----------
    hidden_states : Tensor of shape (n_visual, hidden_size)
    scores : Tensor of shape (n_visual,)
    drop_idx : Tensor of shape (n_dropped,), int64
    n_recycled, n_clusters : int
        From :func:`count_clusters`; ``n_clusters`` ≥ 1.
    merge : {"mean", "sum"}

    Returns
    -------
    centres : Tensor of shape (n_clusters,), int64
        Rows that stand for a cluster, sorted.
    members : Tensor of shape (n_recycled,), int64
    target : Tensor of shape (n_recycled,), int64
        Centre that each member is merged into.
    weight : Tensor of shape (n_recycled,), float32
    """
    members = drop_idx[top_k(scores[drop_idx], n_recycled)]
    states = hidden_states[members]
    local_centres = density_peaks(states, n_clusters)
    cluster_idx = assign_to_centres(states, local_centres)
    weight = torch.ones(members.shape[0], device=members.device)
    if merge == "mean":
        weight = 1.0 / torch.bincount(cluster_idx, minlength=members.shape[0])[cluster_idx].float()
    return members[local_centres], members, members[cluster_idx], weight


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


def _distances(points: Tensor, rows: slice) -> Tensor:
    """Distances of some rows to all, exactly zero on the diagonal."""
    return torch.cdist(points[rows], points, compute_mode="donot_use_mm_for_euclid_dist")


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK_ROWS, n)) for start in range(0, n, _CHUNK_ROWS)]
