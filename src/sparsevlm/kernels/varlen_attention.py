"""Attention within each of several sequences that lie one behind the other, without padding."""

from __future__ import annotations

import contextlib
import itertools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .choice import flash_runs

_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scaling: float, causal: bool
) -> Tensor:
    """Softmax attention of every sequence within itself.

    On a CUDA device, in half precision, this is FlashAttention as torch carries it, in one call; elsewhere
    :func:`varlen_attention_plain`.

    Parameters
    ----------
    query : Tensor of shape (n_rows, heads, head_dim)
    key, value : Tensor of shape (n_rows, kv_heads, head_dim)
        Query head h reads key head ``h // (heads / kv_heads)``.
    offsets : Tensor of shape (n_sequences + 1,), int32
        Sequence i has the rows ``offsets[i]`` to ``offsets[i + 1]``; all rows belong to one.
    longest : int
        No sequence has more rows.
    scaling : float
    causal : bool

    Returns
    -------
    Tensor of shape (n_rows, heads, head_dim)
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and flash_runs():
        out = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, offsets, longest, longest, 0.0, causal, False, scale=scaling
        )
        return out[0]
    return varlen_attention_plain(query, key, value, offsets, scaling, causal)


def equal_attention(query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float, causal: bool) -> Tensor:
    """:func:`varlen_attention` for sequences of ``length`` rows each.

    On a CUDA device, in half precision, cuDNN's attention comes first, which is the faster one there.
    """
    shape = (query.shape[0] // length, length)
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(_ORDER, set_priority=True) if query.is_cuda else contextlib.nullcontext():
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1)


def varlen_attention_plain(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scaling: float, causal: bool
) -> Tensor:
    """The truth: sequence by sequence, those of equal length that are neighbours in one call."""
    mixed = []
    spans = itertools.groupby(itertools.pairwise(offsets.tolist()), key=lambda span: span[1] - span[0])
    for length, group in spans:
        members = list(group)
        rows = slice(members[0][0], members[-1][1])
        if length:
            mixed.append(equal_attention(query[rows], key[rows], value[rows], length, scaling, causal))
    return torch.cat(mixed) if mixed else torch.zeros_like(query)
