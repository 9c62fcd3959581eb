"""Products of all pairs of rows, nearly as exact as float32 at the speed of half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


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
    left, right = split(rows, others)
    if not rows.is_cuda:  # where no product of bfloat16 gives float32
        return left.float() @ right.float().mT
    found: Tensor = torch.bmm(left, right.mT, out_dtype=torch.float32)
    return found


def split(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of the rows side by side, of the length 3 · size, so that the product of two is that of three parts.

    Returns
    -------
    left, right : Tensor of shape (batch, n, 3 * size) and (batch, n_others, 3 * size), bfloat16
    """
    if use_triton(rows):
        from .triton.gram_matrix import split as triton_version

        return triton_version(rows, others)
    return split_reference(rows, others)


def split_reference(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    high, low = _parts(rows)
    left = torch.cat([high, high, low], dim=-1)
    high, low = (high, low) if others is rows else _parts(others)
    return left, torch.cat([high, low, high], dim=-1)


def _parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    high = rows.bfloat16()
    return high, (rows - high.float()).bfloat16()
