"""RMSNorm, with the residual sum before it."""

from __future__ import annotations

import torch
from torch import Tensor

from .choice import takes_triton


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x = hidden + residual``, then ``weight · x / sqrt(mean(x²) + eps)``.

    Parameters
    ----------
    hidden : Tensor of shape (n, size)
    weight : Tensor of shape (size,)
    eps : float
    residual : Tensor of shape (n, size), optional
        Added first, in the dtype of ``hidden``.

    Returns
    -------
    normed, x : Tensor of shape (n, size)
        In the dtype of ``hidden``; the sum of squares is taken in float32.
    """
    if takes_triton(hidden):
        from .triton.norm import rms_norm as twin

        return twin(hidden, weight, eps, residual)
    return rms_norm_plain(hidden, weight, eps, residual)


def rms_norm_plain(hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The truth; rounds where transformers' modules do."""
    x = hidden if residual is None else hidden + residual
    exact = x.float()
    scaled = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype), x
