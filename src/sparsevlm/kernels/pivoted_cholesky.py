"""Greedy pivots of a Gram matrix: incremental Cholesky, in the order of the largest diagonal that is left."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def pivoted_cholesky(
    gram: Tensor, quality: Tensor, n_keep: int, rounds: bool, noise: float, counts: Tensor | None = None
) -> Tensor:
    """``argmax_i r_i² δ_i``, δ_i the diagonal of what the picks leave of the Gram matrix; ties to the lower index.

    A row of which less than ``noise`` of its length is left is spanned: it comes after all others, by its quality.

    Parameters
    ----------
    gram : Tensor of shape (batch, n, n), float32
    quality : Tensor of shape (batch, n), float32
        r, in [0, 1].
    n_keep : int
        In [1, n].
    rounds : bool
        Once all rows are spanned, go on as if none had been picked.
    noise : float
        Share of the squared length.
    counts : Tensor of shape (batch,), int64, optional
        Picks of each sample that are looked at; those behind may be any rows.

    Returns
    -------
    Tensor of shape (batch, n_keep), int64
        In the order of the picks.
    """
    if use_triton(gram):
        from .triton.pivoted_cholesky import pivoted_cholesky as triton_version

        return triton_version(gram, quality, n_keep, rounds, noise, counts)
    return pivoted_cholesky_reference(gram, quality, n_keep, rounds, noise)


def spanning_picks(
    gram: Tensor, enough: Tensor, least: Tensor, most: Tensor, n_picks: int, noise: float
) -> tuple[Tensor, Tensor]:
    """The picks of :func:`pivoted_cholesky` in rounds, all of quality 1, until little is left of any row.

    Parameters
    ----------
    gram : Tensor of shape (batch, n, n), float32
    enough : Tensor of shape (batch,), float32
        Squared length that may be left of a row of each sample.
    least, most : Tensor of shape (batch,), int64
        Picks of each sample at least and at most; ``most`` wins.
    n_picks : int
        No sample has more; in [1, n].
    noise : float
        Share of the squared length; a row of which less is left is explained, too.

    Returns
    -------
    order : Tensor of shape (batch, n_picks), int64
        Behind the picks of a sample any rows.
    counts : Tensor of shape (batch,), int64
        How many picks there are.
    """
    if use_triton(gram):
        from .triton.pivoted_cholesky import spanning_picks as triton_version

        return triton_version(gram, enough, least, most, n_picks, noise)
    return spanning_picks_reference(gram, enough, least, most, n_picks, noise)


def spanning_picks_reference(
    gram: Tensor, enough: Tensor, least: Tensor, most: Tensor, n_picks: int, noise: float
) -> tuple[Tensor, Tensor]:
    """Reference in plain torch: of all picks, those of which there was more left."""
    order = pivoted_cholesky_reference(gram, gram.new_ones(gram.shape[:2]), n_picks, True, noise)
    picked = gram.gather(1, order[..., None].expand(-1, -1, gram.shape[2]))
    left = picked.gather(2, order[:, None].expand(-1, n_picks, -1))
    limits = torch.maximum(enough[:, None], noise * gram.diagonal(dim1=1, dim2=2).gather(1, order))
    counts, is_open = torch.zeros_like(most), torch.ones_like(most, dtype=torch.bool)
    for step in range(n_picks):
        is_open = is_open & (left[:, step, step] > limits[:, step])
        counts = counts + is_open
        column = left[:, :, step] / left[:, step, step, None].clamp_min(1e-30).sqrt()
        left = left - column[:, :, None] * column[:, None]
    return order, torch.minimum(most, torch.maximum(counts, least))


def pivoted_cholesky_reference(gram: Tensor, quality: Tensor, n_keep: int, rounds: bool, noise: float) -> Tensor:
    """Reference in plain torch."""
    batch, n = quality.shape
    length = gram.diagonal(dim1=-2, dim2=-1)
    residual, factor = length.clone(), gram.new_zeros((batch, n_keep, n))
    taken = torch.zeros((batch, n), dtype=torch.bool, device=gram.device)
    in_round = gram.new_ones((batch, n_keep))
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=gram.device)
    for step in range(n_keep):
        spanned = residual <= noise * length
        if rounds:
            anew = (spanned | taken).all(dim=-1, keepdim=True)
            residual = torch.where(anew, length, residual)
            in_round[:, :step].masked_fill_(anew, 0.0)
            spanned = residual <= noise * length
        gain = torch.where(spanned, quality - 2.0, quality.square() * residual).masked_fill(taken, -torch.inf)
        pick = gain.argmax(dim=-1, keepdim=True)
        order[:, step] = pick[:, 0]
        taken.scatter_(1, pick, True)
        of_pick = factor[:, :step].gather(2, pick[:, None].expand(-1, step, 1)) * in_round[:, :step, None]
        column = gram.gather(1, pick[:, None].expand(-1, 1, n))[:, 0] - (of_pick * factor[:, :step]).sum(dim=1)
        left, none = residual.gather(1, pick), spanned.gather(1, pick)
        factor[:, step] = torch.where(none, 0.0, column / left.masked_fill(none, 1.0).sqrt())
        residual = residual - factor[:, step].square()
    return order
