"""States of samples out of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def take_states(hidden: Tensor, rows: Tensor, numbers: Tensor, is_faulty: Tensor) -> tuple[Tensor, Tensor]:
    """Gather some rows of every sample.

    Parameters
    ----------
    hidden : Tensor of shape (n_rows, hidden_size)
    rows : Tensor of shape (batch, most), int64
    numbers : Tensor of shape (batch,), int64
        How many of a sample's count.
    is_faulty : Tensor of shape (1,), bool
        Becomes True where one that counts holds NaN or infinity.

    Returns
    -------
    states : Tensor of shape (batch, most, hidden_size)
    valid : Tensor of shape (batch, most), bool
        Which count.
    """
    if use_triton(hidden):
        from .triton.take_states import take_states as triton_version

        return triton_version(hidden, rows, numbers, is_faulty)
    return take_states_reference(hidden, rows, numbers, is_faulty)


def take_states_reference(hidden: Tensor, rows: Tensor, numbers: Tensor, is_faulty: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    valid = torch.arange(rows.shape[1], device=hidden.device) < numbers[:, None]
    states = hidden[rows]
    is_faulty |= ~(torch.isfinite(states) | ~valid[..., None]).all()
    return states, valid
