"""Rows that others are merged into, of several samples and without waiting for their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def write_merged(
    hidden: Tensor, rows: Tensor, numbers: Tensor, states: Tensor, kept: Tensor, target: Tensor, weight: Tensor
) -> None:
    """Write ``Σ_{i: target[i] = j} weight[i] states[i]`` for the kept tokens j, where these are not their state alone.

    Sums are taken in float32, in the order of the tokens.

    Parameters
    ----------
    hidden : Tensor of shape (n_rows, hidden_size)
        Written in place; holds the states of the kept tokens already. The last row is padding, and may be any.
    rows : Tensor of shape (batch, most), int64
        Where the kept tokens are in it.
    numbers : Tensor of shape (batch,), int64
        How many of a sample count.
    states : Tensor of shape (batch, n, hidden_size)
        Of all tokens.
    kept : Tensor of shape (batch, most), int64
        Indices of the kept tokens.
    target : Tensor of shape (batch, n), int64
        -1: goes nowhere.
    weight : Tensor of shape (batch, n), float32
    """
    if use_triton(hidden):
        from .triton.merge import write_merged as triton_version

        triton_version(hidden, rows, numbers, states, kept, target, weight)
    else:
        write_merged_reference(hidden, rows, numbers, states, kept, target, weight)


def write_merged_reference(
    hidden: Tensor, rows: Tensor, numbers: Tensor, states: Tensor, kept: Tensor, target: Tensor, weight: Tensor
) -> None:
    """Reference in plain torch."""
    merged = merged_states(states, kept, target, weight)
    counts = torch.arange(kept.shape[1], device=kept.device) < numbers[:, None]
    written = torch.where(counts, rows, hidden.shape[0] - 1)
    hidden.index_copy_(0, written.flatten(), merged.flatten(0, 1))


def merged_states(states: Tensor, kept: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """What :func:`write_merged` writes, in plain torch; the state itself where it writes nothing.

    Returns
    -------
    Tensor of shape (batch, most, hidden_size)
    """
    batch, n, size = states.shape
    itself = torch.arange(n, device=target.device)
    joins = target >= 0
    moving = joins & (target != itself)
    # What joins nothing is added to one row behind the end.
    begins = torch.arange(batch, device=target.device)[:, None] * n
    flat = torch.where(joins, begins + target.clamp_min(0), batch * n).flatten()
    changed = torch.zeros(batch * n + 1, dtype=torch.bool, device=target.device)
    changed.index_fill_(0, torch.where(moving.flatten(), flat, batch * n), True)
    changed = changed[:-1].view(batch, n) | (joins & ~moving & (weight != 1.0))
    sums = torch.zeros((batch * n + 1, size), dtype=torch.float32, device=target.device)
    sums.index_add_(0, flat, (states.float() * weight[..., None]).flatten(0, 1))
    own = kept[..., None].expand(-1, -1, size)
    merged = sums[:-1].view(batch, n, size).gather(1, own).to(states.dtype)
    return torch.where(changed.gather(1, kept)[..., None], merged, states.gather(1, own))
