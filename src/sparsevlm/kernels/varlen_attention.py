"""Attention within each of several sequences that lie one behind the other, without padding."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


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
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        out = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, offsets, longest, longest, 0.0, causal, False, scale=scaling
        )
        return out[0]
    return varlen_attention_plain(query, key, value, offsets, scaling, causal)


def varlen_attention_plain(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scaling: float, causal: bool
) -> Tensor:
    """The truth: sequence by sequence, those of equal length that are neighbours in one call."""
    mixed = []
    spans = itertools.groupby(itertools.pairwise(offsets.tolist()), key=lambda span: span[1] - span[0])
    for length, group in spans:
        members = list(group)
        rows = slice(members[0][0], members[-1][1])
        if length == 0:
            continue
        q, k, v = (x[rows].unflatten(0, (len(members), length)).transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed) if mixed else torch.zeros_like(query)
