"""Masks and indices of samples filled up to one size, found without waiting for any value of the device."""

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


def first_picks(order: Tensor, n_keep: Tensor, n: int) -> Tensor:
    """Mask, (batch, n), of the first ``n_keep`` rows of every sample in the order of their picks.

    Parameters
    ----------
    order : Tensor of shape (batch, most_kept), int64
    n_keep : Tensor of shape (batch,), int64
    n : int
    """
    late = torch.arange(order.shape[1], device=order.device) >= n_keep[:, None]
    mask = torch.zeros((order.shape[0], n + 1), dtype=torch.bool, device=order.device)
    return mask.scatter_(1, torch.where(late, n, order), True)[:, :-1]


def indices_of(mask: Tensor, most: int) -> Tensor:
    """Indices of the True values of every row, ascending, at most ``most``; 0 behind them. (batch, most), int64."""
    indices = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    places = torch.where(mask, mask.cumsum(dim=1) - 1, most).clamp_max(most)
    return indices.new_zeros((mask.shape[0], most + 1)).scatter_(1, places, indices)[:, :most]
