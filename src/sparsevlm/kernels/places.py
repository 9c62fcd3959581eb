"""Masks and indices of samples filled up to one size, found without waiting for any value of the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def first_picks(order: Tensor, n_keep: Tensor, valid: Tensor) -> Tensor:
    """Mask, (batch, n), of the first ``n_keep`` rows of every sample in the order of their picks.

    Parameters
    ----------
    order : Tensor of shape (batch, most_kept), int64
        Where all valid rows are kept these may be any.
    n_keep : Tensor of shape (batch,), int64
    valid : Tensor of shape (batch, n), bool
    """
    if use_triton(order):
        from .triton.places import first_picks as triton_version

        return triton_version(order, n_keep, valid)
    return first_picks_reference(order, n_keep, valid)


def first_picks_reference(order: Tensor, n_keep: Tensor, valid: Tensor) -> Tensor:
    """Reference in plain torch."""
    n = valid.shape[1]
    late = torch.arange(order.shape[1], device=order.device) >= n_keep[:, None]
    mask = torch.zeros((order.shape[0], n + 1), dtype=torch.bool, device=order.device)
    mask = mask.scatter_(1, torch.where(late, n, order), True)[:, :-1]
    return torch.where((n_keep >= valid.sum(dim=1))[:, None], valid, mask)


def indices_of(mask: Tensor, most: int) -> Tensor:
    """Indices of the True values of every row, ascending, at most ``most``; 0 behind them. (batch, most), int64."""
    if use_triton(mask):
        from .triton.places import indices_of as triton_version

        return triton_version(mask, most)
    return indices_of_reference(mask, most)


def indices_of_reference(mask: Tensor, most: int) -> Tensor:
    """Reference in plain torch."""
    indices = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    places = torch.where(mask, mask.cumsum(dim=1) - 1, most).clamp_max(most)
    return indices.new_zeros((mask.shape[0], most + 1)).scatter_(1, places, indices)[:, :most]
