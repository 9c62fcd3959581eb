"""Linear layers of a few rows, whose time is that of reading the weight; with what comes before and behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .dispatch import use_triton
from .elementwise import Norm, rms_norm_reference, swiglu_reference

# More rows are for matrix kernels.
MOST_ROWS = 16
FLOAT8 = torch.float8_e4m3fn
_ADA = (8, 9)
# Rows of a weight that are converted at a time, in float32.
_CHUNK = 4096


@dataclass(frozen=True)
class LinearWeights:
    """Weights of a linear layer.

    Attributes
    ----------
    weight : Tensor of shape (n_out, n_in)
        In the dtype of the inputs, or float8_e4m3fn; rows may lie apart.
    bias : Tensor of shape (n_out,), optional
    scale : Tensor of shape (n_out,), float32, optional
        Of the rows of a float8 weight: ``weight · scale`` is what they stand for.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None


def check_float8(device: torch.device) -> None:
    """Refuse a GPU that does not read float8.

    Raises
    ------
    NotImplementedError
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _ADA:
        raise NotImplementedError(
            f"weights='fp8' wants a GPU that reads float8, of compute capability 8.9 (Ada) or newer; this one has "
            f"{found[0]}.{found[1]}. Leave weights out."
        )


def round_to_float8(weight: Tensor, rounded: Tensor, scale: Tensor) -> None:
    """Round to float8, each row scaled so that its largest number becomes float8's largest, 448.

    Parameters
    ----------
    weight : Tensor of shape (n_out, n_in)
    rounded : Tensor of shape (n_out, n_in), float8_e4m3fn
        Written: ``rounded · scale`` differs from ``weight`` by a 16th of each number at most; of those below 2⁻⁶ of
        ``scale``, by 2⁻¹⁰ of it.
    scale : Tensor of shape (n_out,), float32
        Written.
    """
    largest = torch.finfo(FLOAT8).max
    for start in range(0, weight.shape[0], _CHUNK):
        rows = slice(start, start + _CHUNK)
        exact = weight[rows].float()
        highest = exact.abs().amax(dim=1)
        scale[rows] = torch.where(highest > 0, highest / largest, 1.0)
        rounded[rows] = (exact / scale[rows, None]).clamp(-largest, largest).to(FLOAT8)


def skinny_linear(
    x: Tensor, weights: LinearWeights, norm: Norm | None = None, residual: Tensor | None = None, gated: bool = False
) -> Tensor:
    """``norm(x) · weightᵀ · scale + bias``, then ``silu(first half) · second half`` if gated, then ``+ residual``.

    Parameters
    ----------
    x : Tensor of shape (n, n_in)
        At most :data:`MOST_ROWS` rows on a CUDA device.
    weights : LinearWeights
    norm : Norm, optional
        Of the inputs.
    residual : Tensor of shape (n, n_out), optional
        Added last.
    gated : bool
        The weight holds gate and up one behind the other, and SwiGLU makes half as many outputs of them.

    Returns
    -------
    Tensor of shape (n, n_out) or, gated, (n, n_out / 2)
        In the dtype of ``x``; products are summed in float32.
    """
    if use_triton(x):
        from .triton.skinny_linear import skinny_linear as triton_version

        return triton_version(x, weights, norm, residual, gated)
    return skinny_linear_reference(x, weights, norm, residual, gated)


def skinny_linear_reference(
    x: Tensor, weights: LinearWeights, norm: Norm | None, residual: Tensor | None, gated: bool
) -> Tensor:
    """Reference in plain torch; rounds where transformers' modules do."""
    if norm is not None:
        x, _ = rms_norm_reference(x, norm.weight, norm.eps, None)
    if weights.scale is None:
        out = linear(x, weights.weight, weights.bias)
    else:
        exact = linear(x.float(), weights.weight.float()) * weights.scale
        out = (exact if weights.bias is None else exact + weights.bias).to(x.dtype)
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = swiglu_reference(gate, up)
    return out if residual is None else out + residual
