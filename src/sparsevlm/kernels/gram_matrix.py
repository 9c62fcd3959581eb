"""Products of all pairs of rows, nearly as exact as float32 at the speed of half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def gram_matrix(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """``x_i · y_j`` for all pairs.

    On a CUDA device each row is split into a bfloat16 part and what that leaves, and three of the four products of
    parts are summed in float32: the one that is left out is below 2⁻¹⁶ of the product of the lengths.

    Parameters
    ----------
    rows : Tensor of shape (batch, n, size), float32
    others : Tensor of shape (batch, n_others, size), float32, optional
        y; the same rows by default.

    Returns
    -------
    Tensor of shape (batch, n, n_others), float32
    """
    others = rows if others is None else others
    return gram_matrix_split(rows, others) if rows.is_cuda else rows @ others.mT


def gram_matrix_split(rows: Tensor, others: Tensor) -> Tensor:
    """The fast way."""
    high, low = _split(rows)
    left = torch.cat([high, high, low], dim=-1)
    high, low = (high, low) if others is rows else _split(others)
    right = torch.cat([high, low, high], dim=-1).mT
    if not rows.is_cuda:  # where no product of bfloat16 gives float32
        return left.float() @ right.float()
    found: Tensor = torch.bmm(left, right, out_dtype=torch.float32)
    return found


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    high = rows.bfloat16()
    return high, (rows - high.float()).bfloat16()
