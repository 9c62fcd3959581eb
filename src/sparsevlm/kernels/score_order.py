"""Orders of scores of samples filled up to one size, found without waiting for any value of the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def highest(scores: Tensor, valid: Tensor, n_keep: Tensor) -> Tensor:
    """Mask of the ``n_keep`` highest scores of every sample; ties go to the lower index, NaN comes first.

    Parameters
    ----------
    scores : Tensor of shape (batch, n)
    valid : Tensor of shape (batch, n), bool
        Others are never among them.
    n_keep : Tensor of shape (batch,), int64
    """
    if use_triton(scores):
        from .triton.score_order import highest as triton_version

        return triton_version(scores, valid, n_keep)
    return highest_reference(scores, valid, n_keep)


def highest_reference(scores: Tensor, valid: Tensor, n_keep: Tensor) -> Tensor:
    """Reference in plain torch."""
    return (place_by_score_reference(scores, valid) < n_keep[:, None]) & valid


def place_by_score(scores: Tensor, valid: Tensor) -> Tensor:
    """Place of every row in the order of the scores, the highest first, rows that are not valid behind.

    Parameters
    ----------
    scores : Tensor of shape (batch, n)
    valid : Tensor of shape (batch, n), bool
        False for rows that only fill a sample up, behind the others.

    Returns
    -------
    Tensor of shape (batch, n), int64
    """
    if use_triton(scores):
        from .triton.score_order import place_by_score as triton_version

        return triton_version(scores, valid)
    return place_by_score_reference(scores, valid)


def place_by_score_reference(scores: Tensor, valid: Tensor) -> Tensor:
    """Reference in plain torch."""
    order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
