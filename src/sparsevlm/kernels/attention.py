"""Attention over rows that lie one behind the other without padding: of a prompt, and of one new token per sample.

A layer's cache has two parts: what the prompt left there, packed over the samples, and the tokens made since, one row
per sample. Neither is copied when a token comes.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .dispatch import flash_runs, use_triton

# Fast kernels take head sizes that are multiples of 8.
_MORE_COLUMNS = 8
# Logit, before scaling, of a row that is not to be seen: half precision holds it, and its exponential is 0.
_HIDDEN = -30000.0
_OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *_OTHERS]
# cuDNN plans every new shape for 50 ms, which a few calls of so few rows never bring back.
_FEW_ROWS = 1024
_ORDER_OF_FEW = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, *_OTHERS]


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float, causal: bool
) -> Tensor:
    """Softmax attention of every sequence within itself.

    On a CUDA device, in half precision, this is FlashAttention as torch carries it, in one call; elsewhere
    :func:`varlen_attention_reference`.

    Parameters
    ----------
    query : Tensor of shape (n_rows, heads, head_dim)
    key, value : Tensor of shape (n_rows, kv_heads, head_dim)
        Query head h reads key head ``h // (heads / kv_heads)``.
    cu_seqlens : Tensor of shape (n_sequences + 1,), int32
        Sequence i has the rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``; all rows belong to one.
    max_seqlen : int
        No sequence has more rows.
    scaling : float
    causal : bool

    Returns
    -------
    Tensor of shape (n_rows, heads, head_dim)
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and flash_runs():
        out = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, causal, False, scale=scaling
        )
        return out[0]
    return varlen_attention_reference(query, key, value, cu_seqlens, scaling, causal)


def continued_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, most: tuple[int, int],
    scaling: float,
) -> Tensor:  # fmt: skip
    """Causal softmax attention of the last rows of every sequence to the whole of it.

    On a CUDA device, in half precision, this is FlashAttention as torch carries it, in one call; elsewhere
    :func:`continued_attention_reference`.

    Parameters
    ----------
    query : Tensor of shape (n_queries, heads, head_dim)
        Query head h reads key head ``h // (heads / kv_heads)``.
    key, value : Tensor of shape (n_keys, kv_heads, head_dim)
    cu_queries, cu_keys : Tensor of shape (n_sequences + 1,), int32
        Sequence i has the keys ``cu_keys[i]`` to ``cu_keys[i + 1]``; the last of them are those of its queries.
    most : tuple of int
        No sequence has more queries, and more keys.
    scaling : float

    Returns
    -------
    Tensor of shape (n_queries, heads, head_dim)
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and flash_runs():
        out = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_queries, cu_keys, *most, 0.0, True, False, scale=scaling
        )
        return out[0]
    return continued_attention_reference(query, key, value, cu_queries, cu_keys, scaling)


def continued_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, scaling: float
) -> Tensor:
    """Reference in plain torch: sequence by sequence."""
    mixed = []
    spans = (itertools.pairwise(bounds.tolist()) for bounds in (cu_queries, cu_keys))
    for queries, keys in zip(*spans, strict=True):
        q, k, v = (x[None, slice(*rows)].transpose(1, 2) for x, rows in ((query, queries), (key, keys), (value, keys)))
        sees = torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=sees, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        mixed.append(out[0].transpose(0, 1))
    return torch.cat(mixed)


def equal_attention(
    query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float, causal: bool,
    order: Sequence[SDPBackend] = _ORDER,
) -> Tensor:  # fmt: skip
    """:func:`varlen_attention` for sequences of ``length`` rows each.

    On a CUDA device, in half precision, cuDNN's attention comes first, which is the faster one there, unless another
    ``order`` is given.
    """
    shape = (query.shape[0] // length, length)
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(list(order), set_priority=True) if query.is_cuda else contextlib.nullcontext():
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1)


def padded_attention(query: Tensor, key: Tensor, value: Tensor, n_rows: Tensor, scaling: float) -> Tensor:
    """Softmax attention of the first ``n_rows`` rows among themselves, without waiting for that number.

    On a CUDA device one more column of queries and keys hides the rows behind, whose weights become exactly 0, so that
    cuDNN's attention can run; elsewhere :func:`padded_attention_reference`.

    Parameters
    ----------
    query : Tensor of shape (n, heads, head_dim)
    key, value : Tensor of shape (n, kv_heads, head_dim)
    n_rows : Tensor of shape (1,), integer
    scaling : float

    Returns
    -------
    Tensor of shape (n, heads, head_dim)
        Rows behind ``n_rows`` say nothing.
    """
    if not query.is_cuda:
        return padded_attention_reference(query, key, value, n_rows, scaling)
    n, head_dim = query.shape[0], query.shape[-1]
    query, key, value = (torch.nn.functional.pad(x, (0, _MORE_COLUMNS)) for x in (query, key, value))
    query[..., head_dim] = 1.0
    outside = torch.arange(n, device=query.device) >= n_rows
    key[..., head_dim] = (outside * _HIDDEN).to(key.dtype)[:, None]
    order = _ORDER if n > _FEW_ROWS else _ORDER_OF_FEW
    return equal_attention(query, key, value, n, scaling, causal=False, order=order)[..., :head_dim]


def padded_attention_reference(query: Tensor, key: Tensor, value: Tensor, n_rows: Tensor, scaling: float) -> Tensor:
    """Reference in plain torch."""
    n, out = int(n_rows), torch.zeros_like(query)
    out[:n] = equal_attention(query[:n], key[:n], value[:n], n, scaling, causal=False)
    return out


def varlen_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scaling: float, causal: bool
) -> Tensor:
    """Reference in plain torch: sequence by sequence, those of equal length that are neighbours in one call."""
    mixed = []
    spans = itertools.groupby(itertools.pairwise(cu_seqlens.tolist()), key=lambda span: span[1] - span[0])
    for length, group in spans:
        members = list(group)
        rows = slice(members[0][0], members[-1][1])
        if length:
            mixed.append(equal_attention(query[rows], key[rows], value[rows], length, scaling, causal))
    return torch.cat(mixed) if mixed else torch.zeros_like(query)


@dataclass(frozen=True)
class RaggedCache:
    """Keys and values of one layer.

    Attributes
    ----------
    prompt_keys, prompt_values : Tensor of shape (n_rows, kv_heads, head_dim)
        Sample b has the rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``; rows behind the last are not read.
    cu_seqlens : Tensor of shape (batch + 1,), int32
    new_keys, new_values : Tensor of shape (batch, room, kv_heads, head_dim)
    n_new : Tensor of shape (1,), int32
        How many of ``room`` are filled; on the device, so that a captured graph serves every step.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    cu_seqlens: Tensor
    new_keys: Tensor
    new_values: Tensor
    n_new: Tensor


def decode_attention(query: Tensor, cache: RaggedCache, scaling: float) -> Tensor:
    """Softmax attention over both parts of the cache.

    Parameters
    ----------
    query : Tensor of shape (batch, heads, head_dim)
        Query head h reads key head ``h // (heads / kv_heads)``.
    cache : RaggedCache
    scaling : float

    Returns
    -------
    Tensor of shape (batch, heads, head_dim)
        In the dtype of ``query``; scores and sums in float32.
    """
    if use_triton(query):
        from .triton.attention import decode_attention as triton_version

        return triton_version(query, cache, scaling)
    return decode_attention_reference(query, cache, scaling)


def decode_attention_reference(query: Tensor, cache: RaggedCache, scaling: float) -> Tensor:
    """Reference in plain torch: sample by sample."""
    groups = query.shape[1] // cache.prompt_keys.shape[1]
    n_new, cu_seqlens, out = int(cache.n_new), cache.cu_seqlens.tolist(), []
    for b in range(query.shape[0]):
        rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
        key = torch.cat([cache.prompt_keys[rows], cache.new_keys[b, :n_new]]).repeat_interleave(groups, dim=1)
        value = torch.cat([cache.prompt_values[rows], cache.new_values[b, :n_new]]).repeat_interleave(groups, dim=1)
        scores = torch.einsum("hd,nhd->hn", query[b].float(), key.float()) * scaling
        out.append(torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), value.float()).to(query.dtype))
    return torch.stack(out)
