"""Rounds of bipartite soft matching of several samples, without waiting for how many rows these have.

Of the rows of a sample that are left, in order, every even one proposes to its most similar odd one, and the best pairs
merge: ``min(⌊n / 2⌋, n − n_keep)`` of n rows.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), arXiv 2210.09461.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton
from .score_order import highest_reference


def best_partners(similarity: Tensor, n_left: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar odd row of each even one, ties to the lower.

    Parameters
    ----------
    similarity : Tensor of shape (batch, n_even, n_odd), float32
        Of some even rows with all odd ones; NaN is the most similar.
    n_left : Tensor of shape (batch,), int64
        Rows of a sample that are left; half of them, rounded down, are the odd ones that count.

    Returns
    -------
    score : Tensor of shape (batch, n_even), float32
        -inf in samples that have no odd row.
    partner : Tensor of shape (batch, n_even), int64
        Index among the odd rows.
    """
    if use_triton(similarity):
        from .triton.bipartite_merge import best_partners as triton_version

        return triton_version(similarity, n_left)
    return best_partners_reference(similarity, n_left)


def best_partners_reference(similarity: Tensor, n_left: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    counts = torch.arange(similarity.shape[2], device=similarity.device) < n_left[:, None] // 2
    best = similarity.masked_fill(~counts[:, None], -torch.inf).max(dim=-1)
    return best.values, best.indices


def merge_best_pairs(
    score: Tensor, partner: Tensor, n_left: Tensor, n_keep: Tensor, row_of: Tensor, is_kept: Tensor, n_rows: int
) -> Tensor:
    """Merge the pairs with the highest scores, ties to the lower row, and close up the rows that stay.

    Parameters
    ----------
    score : Tensor of shape (batch, ⌈n_rows / 2⌉), float32
        Of the even rows; NaN is the highest.
    partner : Tensor of shape (batch, ⌈n_rows / 2⌉), int64
    n_left : Tensor of shape (batch,), int64
        Rows of every sample: at most ``n_rows``, where they are more than ``n_keep``. Brought up to date in place.
    n_keep : Tensor of shape (batch,), int64
    row_of : Tensor of shape (batch, n), int64
        Row that each token is in, -1 for what is no token. Brought up to date in place.
    is_kept : Tensor of shape (batch, n), bool
        Tokens that stand for their row. Brought up to date in place.
    n_rows : int

    Returns
    -------
    Tensor of shape (batch, n_rows), int64
        Place of every row among those that are left, that of its partner if it merges. -1 behind the rows of a sample,
        and for all rows of one that has ``n_keep`` now.
    """
    if use_triton(score):
        from .triton.bipartite_merge import merge_best_pairs as triton_version

        return triton_version(score, partner, n_left, n_keep, row_of, is_kept, n_rows)
    return merge_best_pairs_reference(score, partner, n_left, n_keep, row_of, is_kept, n_rows)


def merge_best_pairs_reference(
    score: Tensor, partner: Tensor, n_left: Tensor, n_keep: Tensor, row_of: Tensor, is_kept: Tensor, n_rows: int
) -> Tensor:
    """Reference in plain torch."""
    n_merged = torch.minimum(n_left // 2, n_left - n_keep).clamp_min(0)
    is_even = 2 * torch.arange(score.shape[1], device=score.device) < n_left[:, None]
    gone = highest_reference(score, is_even, n_merged)
    row = torch.arange(n_rows, device=score.device).expand(score.shape[0], -1)
    is_gone = gone.gather(1, row // 2) & (row % 2 == 0)
    into = torch.where(is_gone, 2 * partner.gather(1, row // 2) + 1, row)
    place = into - gone.cumsum(dim=1).gather(1, into // 2)
    moves = (row_of >= 0) & (n_merged > 0)[:, None]
    own = row_of.clamp(0, n_rows - 1)
    is_kept &= ~(moves & is_gone.gather(1, own))
    row_of.copy_(torch.where(moves, place.gather(1, own), row_of))
    goes_on = (n_merged > 0) & (n_left - n_merged > n_keep)
    places = torch.where((row < n_left[:, None]) & goes_on[:, None], place, -1)
    n_left -= n_merged
    return places


def merged_rows(rows: Tensor, places: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Sums of the rows that come to one place, and these scaled to length 1; zero rows stay zero.

    Parameters
    ----------
    rows : Tensor of shape (batch, n, size)
    places : Tensor of shape (batch, n), int64
        Below ``most``; -1: nowhere.
    most : int

    Returns
    -------
    sums : Tensor of shape (batch, most, size), float32
        Taken in float64, in which the order of the rows hardly shows.
    unit : Tensor of shape (batch, most, size), float32
    """
    if use_triton(rows):
        from .triton.bipartite_merge import merged_rows as triton_version

        return triton_version(rows, places, most)
    return merged_rows_reference(rows, places, most)


def merged_rows_reference(rows: Tensor, places: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    batch, _, size = rows.shape
    # What comes nowhere is added to one row behind the end.
    begins = torch.arange(batch, device=places.device)[:, None] * most
    flat = torch.where(places >= 0, begins + places, batch * most).flatten()
    sums = torch.zeros((batch * most + 1, size), dtype=torch.float64, device=rows.device)
    sums = sums.index_add_(0, flat, rows.double().flatten(0, 1))[:-1].float().view(batch, most, size)
    return sums, torch.nn.functional.normalize(sums, dim=-1)
