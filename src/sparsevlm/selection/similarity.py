"""Cosine similarities of tokens in bounded blocks, and the scaling of scores, for the selectors that compare tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.gram_matrix import gram_matrix

# One for both paths: behind the engine's programs nobody knows what of it was no number.
NOT_FINITE = "visual tokens, or what they are judged by, hold NaN or infinity; check the model's inputs and dtype."
# Upper bound of the elements of one block of similarities: 16 Mi float32 = 64 MiB.
_MAX_BLOCK_ELEMENTS = 1 << 24


def finite(values: Tensor) -> Tensor:
    """Give back ``values`` as float32, without their gradient: a choice has none, and a greedy loop would pile it up.

    Raises
    ------
    ValueError
        If they hold NaN or infinity.
    """
    values = values.detach().float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(NOT_FINITE)
    return values


def unit_rows(states: Tensor) -> Tensor:
    """Rows scaled to length 1, whose products are cosines; a zero row stays zero and is similar to nothing.

    Parameters
    ----------
    states : Tensor of shape (n, size)

    Returns
    -------
    Tensor of shape (n, size), float32

    Raises
    ------
    ValueError
        If a row holds NaN or infinity.
    """
    return torch.nn.functional.normalize(finite(states), dim=-1)


def min_max(scores: Tensor) -> Tensor:
    """Scores stretched to [0, 1]: ``(s − min s) / (max s − min s)``; equal scores are all 1.

    Parameters
    ----------
    scores : Tensor of shape (n,), float32
    """
    low, high = scores.min(), scores.max()
    # Scores that differ by rounding only are equal: stretched, the rounding would decide.
    differ = high - low > 1e-6 * torch.maximum(high.abs(), low.abs())
    return torch.where(differ, (scores - low) / (high - low), torch.ones_like(scores))


def padded_unit_rows(states: Tensor, valid: Tensor) -> Tensor:
    """:func:`unit_rows` of samples filled up to one size, 0 for what fills up; NaN and infinity stay what they are.

    Parameters
    ----------
    states : Tensor of shape (batch, n, size)
    valid : Tensor of shape (batch, n), bool

    Returns
    -------
    Tensor of shape (batch, n, size), float32
    """
    return torch.nn.functional.normalize(torch.where(valid[..., None], states.float(), 0.0), dim=-1)


def padded_min_max(scores: Tensor, valid: Tensor) -> Tensor:
    """:func:`min_max` of samples filled up to one size, 0 for what fills up.

    Parameters
    ----------
    scores : Tensor of shape (batch, n), float32
    valid : Tensor of shape (batch, n), bool
    """
    low = scores.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    differ = high - low > 1e-6 * torch.maximum(high.abs(), low.abs())
    return torch.where(valid, torch.where(differ, (scores - low) / (high - low), 1.0), 0.0)


def padded_nearest(unit: Tensor, targets: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`nearest_rows` of samples filled up to one size; samples without targets have cosines of -inf.

    Parameters
    ----------
    unit : Tensor of shape (batch, n, size)
    targets : Tensor of shape (batch, n_targets, size)
    counts : Tensor of shape (batch, n_targets), bool
        False for targets that only fill a sample up.

    Returns
    -------
    cosine : Tensor of shape (batch, n), float32
    idx : Tensor of shape (batch, n), int64
    """
    found = [
        (unit[:, rows] @ targets.mT).masked_fill_(~counts[:, None], -torch.inf).max(dim=-1)
        for rows in row_chunks(unit.shape[1], targets.shape[0] * targets.shape[1])
    ]
    return torch.cat([best.values for best in found], dim=1), torch.cat([best.indices for best in found], dim=1)


def cosines(unit: Tensor, others: Tensor) -> Tensor:
    """Products of all rows from :func:`unit_rows` with all others, of shape (n, n_others)."""
    return gram_matrix(unit[None], others[None])[0]


def nearest_rows(unit: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar target of each row, ties to the lower index.

    Parameters
    ----------
    unit : Tensor of shape (n, size)
        From :func:`unit_rows`.
    targets : Tensor of shape (n_targets, size)
        Likewise; ``n_targets`` ≥ 1.

    Returns
    -------
    cosine : Tensor of shape (n,), float32
    idx : Tensor of shape (n,), int64
        Rows of ``targets``.
    """
    found = [(unit[rows] @ targets.T).max(dim=-1) for rows in row_chunks(unit.shape[0], targets.shape[0])]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def row_chunks(n_rows: int, n_columns: int) -> list[slice]:
    """Slices of the rows of an ``n_rows`` × ``n_columns`` matrix, none of more elements than a block may have."""
    chunk = max(1, _MAX_BLOCK_ELEMENTS // max(1, n_columns))
    return [slice(start, min(start + chunk, n_rows)) for start in range(0, n_rows, chunk)]
