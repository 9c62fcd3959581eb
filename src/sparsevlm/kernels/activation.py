"""SwiGLU: the gate's SiLU times the other half."""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import takes_triton


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up``.

    Parameters
    ----------
    gate, up : Tensor of shape (n, size)
        Rows may lie apart, as the halves of one projection do.

    Returns
    -------
    Tensor of shape (n, size)
        Contiguous, in their dtype.
    """
    if takes_triton(gate):
        from .triton.activation import swiglu as twin

        return twin(gate, up)
    return swiglu_plain(gate, up)


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """The truth; rounds where transformers' modules do."""
    return torch.nn.functional.silu(gate) * up
