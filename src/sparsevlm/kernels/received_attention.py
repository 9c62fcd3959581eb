"""Attention that each token of packed sequences receives, without a matrix of all pairs."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .dispatch import use_triton

# Upper bound of the elements of one (heads, rows, keys) float32 block: 64 Mi elements = 256 MiB.
_MAX_BLOCK_ELEMENTS = 1 << 26


def received_attention(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """``a_j = mean_h Σ_i softmax_j(q_i^h · k_j^h · scaling)`` within each unmasked sequence; 1 on average.

    Waits for no value of the device where Triton runs, and gives the same bits each time.

    Parameters
    ----------
    query : Tensor of shape (n_rows, heads, head_dim)
        Rotated; rows and heads may lie apart in memory.
    key : Tensor of shape (n_rows, kv_heads, head_dim)
        Likewise. Query head h reads key head ``h // (heads / kv_heads)``.
    cu_seqlens : Tensor of shape (n_sequences + 1,), int32
        Sequence i has the rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``, from row 0 on.
    scaling : float

    Returns
    -------
    Tensor of shape (n_rows,), float32
        0 for rows behind the last sequence.
    """
    if use_triton(query):
        from .triton.received_attention import received_attention as triton_version

        return triton_version(query, key, cu_seqlens, scaling)
    return received_attention_reference(query, key, cu_seqlens, scaling)


def received_attention_reference(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """Reference in plain torch: sequence by sequence, some rows at a time, with all their logits."""
    n_heads, total = query.shape[1], query.new_zeros(query.shape[0], dtype=torch.float32)
    for first, last in itertools.pairwise(cu_seqlens.tolist()):
        queries = query[first:last].transpose(0, 1)
        key_t = key[first:last].permute(1, 2, 0).repeat_interleave(n_heads // key.shape[1], dim=0).float()
        chunk = max(1, _MAX_BLOCK_ELEMENTS // max(1, n_heads * (last - first)))
        for start in range(0, last - first, chunk):
            logits = torch.matmul(queries[:, start : start + chunk].float() * scaling, key_t)
            total[first:last] += torch.softmax(logits, dim=-1).sum(dim=(0, 1))
    return total / n_heads
