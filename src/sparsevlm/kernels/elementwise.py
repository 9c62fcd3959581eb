"""Element-wise operations of a layer: RMSNorm with the residual sum before it, SwiGLU, rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import use_triton


@dataclass(frozen=True)
class Norm:
    """RMSNorm: ``weight · x / sqrt(mean(x²) + eps)``.

    Attributes
    ----------
    weight : Tensor of shape (size,)
    eps : float
    """

    weight: Tensor
    eps: float


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
    if use_triton(hidden):
        from .triton.elementwise import rms_norm as triton_version

        return triton_version(hidden, weight, eps, residual)
    return rms_norm_reference(hidden, weight, eps, residual)


def rms_norm_reference(hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reference in plain torch; rounds where transformers' modules do."""
    x = hidden if residual is None else hidden + residual
    exact = x.float()
    scaled = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype), x


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
    if use_triton(gate):
        from .triton.elementwise import swiglu as triton_version

        return triton_version(gate, up)
    return swiglu_reference(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Reference in plain torch; rounds where transformers' modules do."""
    return torch.nn.functional.silu(gate) * up


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x · cos + rotate_half(x) · sin`` for queries and keys.

    Parameters
    ----------
    query, key : Tensor of shape (n, heads, head_dim) and (n, kv_heads, head_dim)
        Rows may lie apart, as the parts of one projection do.
    cos, sin : Tensor of shape (n, head_dim)

    Returns
    -------
    query, key : Tensor of the same shapes
        Contiguous, in their dtype.
    """
    if use_triton(query):
        from .triton.elementwise import rotate as triton_version

        return triton_version(query, key, cos, sin)
    return rotate_reference(query, key, cos, sin)


def rotate_into(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slot: Tensor | None = None, norms: tuple[Norm, Norm] | None = None,
) -> Tensor:  # fmt: skip
    """As :func:`rotate`, and put keys and values where they are kept.

    Parameters
    ----------
    query, key, value : Tensor of shape (n, heads, head_dim), and twice (n, kv_heads, head_dim)
        Rows may lie apart, as the parts of one projection do.
    cos, sin : Tensor of shape (n, head_dim)
    keys, values : Tensor of shape (n, kv_heads, head_dim), or with ``slot`` (n, room, kv_heads, head_dim)
        Written.
    slot : Tensor of shape (1,), int32, optional
        Which of ``room`` is written; on the device.
    norms : tuple of Norm, optional
        Of each head of the queries, and of the keys, of shape (head_dim,): taken first, with one ``eps``.

    Returns
    -------
    Tensor of shape (n, heads, head_dim)
        Contiguous.
    """
    if use_triton(query):
        from .triton.elementwise import rotate_into as triton_version

        return triton_version(query, key, value, cos, sin, keys, values, slot, norms)
    return rotate_into_reference(query, key, value, cos, sin, keys, values, slot, norms)


def rotate_into_reference(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slot: Tensor | None = None, norms: tuple[Norm, Norm] | None = None,
) -> Tensor:  # fmt: skip
    """Reference in plain torch."""
    if norms is not None:
        query, key = (
            rms_norm_reference(x, norm.weight, norm.eps, None)[0] for x, norm in zip((query, key), norms, strict=True)
        )
    query, key = rotate_reference(query, key, cos, sin)
    for kept, new in ((keys, key), (values, value)):
        if slot is None:
            kept.copy_(new)
        else:
            kept.index_copy_(1, slot.long(), new[:, None])
    return query


def rotate_reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch, as transformers computes it: in the decoder with tables in the dtype of ``x``, in the
    vision tower with tables in float32, which makes the products so."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query_out, key_out = (x * cos + _rotate_half(x) * sin for x in (query, key))
    return query_out.to(query.dtype), key_out.to(key.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
