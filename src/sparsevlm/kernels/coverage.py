"""Greedy coverage: each pick is the candidate that adds most to what the picks before it cover."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def coverage(values: Tensor, factor: Tensor, valid: Tensor, n_keep: int, noise: float) -> Tensor:
    """``argmax_i f_i Σ_u max(0, v_ui − cur_u)`` with ``cur_u = max(0, max_{j∈S} v_uj)``; ties to the lower index.

    Differences and sums are float64: gains are kept up to date by subtraction, and late ones are as small as what
    float32 would leave of the first by rounding. Waits for no value of the device.

    Parameters
    ----------
    values : Tensor of shape (batch, n_covered, n), float32
        How well candidate i covers u. A row u without a value above 0 counts for nothing, so that a sample may be
        filled up with such rows.
    factor : Tensor of shape (batch, n), float32
        Weight of a candidate's gain, not negative.
    valid : Tensor of shape (batch, n), bool
        False for candidates that only fill a sample up: they are picked after all others, in order.
    n_keep : int
        In [1, n].
    noise : float
        Share of the largest gain of all, before the first pick and without factors; gains up to it are 0.

    Returns
    -------
    Tensor of shape (batch, n_keep), int64
        In the order of the picks.
    """
    if use_triton(values):
        from .triton.coverage import coverage as triton_version

        return triton_version(values, factor, valid, n_keep, noise)
    return coverage_reference(values, factor, valid, n_keep, noise)


def coverage_reference(values: Tensor, factor: Tensor, valid: Tensor, n_keep: int, noise: float) -> Tensor:
    """Reference in plain torch: every step reads all values."""
    order = torch.empty((values.shape[0], n_keep), dtype=torch.int64, device=values.device)
    current = values.new_zeros(values.shape[:2])
    gain = values.double().clamp_min(0.0).sum(dim=1)
    least = noise * gain.where(valid, 0.0).amax(dim=-1, keepdim=True)
    taken = torch.zeros_like(valid)
    for step in range(n_keep):
        score = torch.where(gain > least, gain, 0.0) * factor
        pick = score.where(valid, -1.0).where(~taken, -2.0).argmax(dim=-1, keepdim=True)
        order[:, step] = pick[:, 0]
        taken.scatter_(1, pick, True)
        reached = values.gather(2, pick[:, None].expand(-1, values.shape[1], 1))[..., 0]
        high = torch.maximum(current, reached)
        part = torch.minimum(values, high[..., None]).double() - current[..., None]
        gain = gain - part.clamp_min(0.0).sum(dim=1)
        current = high
    return order
