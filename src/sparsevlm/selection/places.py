"""Orders of scores of samples filled up to one size, found without waiting for any value of the device."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(scores: Tensor, valid: Tensor, n_keep: Tensor) -> Tensor:
    """Mask of the ``n_keep`` highest scores of every sample; ties go to the lower index.

    Parameters
    ----------
    scores : Tensor of shape (batch, n)
    valid : Tensor of shape (batch, n), bool
    n_keep : Tensor of shape (batch,), int64
    """
    return place_by_score(scores, valid) < n_keep[:, None]


def place_by_score(scores: Tensor, valid: Tensor) -> Tensor:
    """Place of every row in the order of the scores, the highest first, rows that are not valid behind; (batch, n)."""
    order = scores.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
