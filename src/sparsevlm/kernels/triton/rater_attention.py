"""Rows and the query heads of one key head make up one side of the products, keys the other."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rater_attention import Rows

_BLOCK_M, _BLOCK_N = 64, 64


@triton.jit
def _load_query(
    query_ptr, first, index, n_here, kv_head, GROUPS: tl.constexpr, N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Query rows for pairs (row, head of the group), and where each pair is in (row, head) order."""
    columns = tl.arange(0, BLOCK_D)
    pair = (first + index // GROUPS) * N_HEADS + kv_head * GROUPS + index % GROUPS
    inside = (index < n_here * GROUPS)[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(query_ptr + pair.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    if EXACT:
        query = query.to(tl.float32)
    return query, pair


@triton.jit
def _logits(
    query, ends, key_ptr, keys, stop, kv_head, scaling, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    inside = (keys < stop)[:, None] & (columns < HEAD_DIM)[None, :]
    at = (keys.to(tl.int64)[:, None] * N_KV_HEADS + kv_head) * HEAD_DIM + columns[None, :]
    key = tl.load(key_ptr + at, mask=inside, other=0.0)
    if EXACT:
        scores = tl.dot(query, tl.trans(key.to(tl.float32)), input_precision="ieee") * scaling
    else:
        scores = tl.dot(query, tl.trans(key)) * scaling
    return tl.where((keys < stop)[None, :] & (keys[None, :] < ends[:, None]), scores, float("-inf"))


@triton.jit
def _row_statistics(
    query_ptr, row_offsets, ends_ptr, key_ptr, key_offsets, marked_ptr, lse_ptr, mass_ptr, scaling,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    sample, kv_head = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = N_HEADS // N_KV_HEADS
    first = tl.load(row_offsets + sample)
    n_here = tl.load(row_offsets + sample + 1) - first
    index = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, pair = _load_query(query_ptr, first, index, n_here, kv_head, groups, N_HEADS, HEAD_DIM, BLOCK_D, EXACT)
    mine = index < n_here * groups
    ends = tl.load(ends_ptr + first + index // groups, mask=mine, other=0)
    start, stop = tl.load(key_offsets + sample), tl.load(key_offsets + sample + 1)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    while start < tl.where(tl.program_id(2) * BLOCK_M < n_here * groups, stop, 0):
        keys = start + tl.arange(0, BLOCK_N)
        scores = _logits(query, ends, key_ptr, keys, stop, kv_head, scaling, N_KV_HEADS, HEAD_DIM, BLOCK_D, EXACT)
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_highest[:, None])
        shrink = tl.exp(highest - new_highest)
        marked = tl.load(marked_ptr + keys, mask=keys < stop, other=0).to(tl.float32)
        total = total * shrink + tl.sum(weights, axis=1)
        mass = mass * shrink + tl.sum(weights * marked[None, :], axis=1)
        highest = new_highest
        start += BLOCK_N
    tl.store(lse_ptr + pair, highest + tl.log(total), mask=mine)
    tl.store(mass_ptr + pair, mass / total, mask=mine)


@triton.jit
def _column_sums(
    query_ptr, row_offsets, ends_ptr, key_ptr, key_offsets, lse_ptr, weight_ptr, sums_ptr, scaling,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    groups: tl.constexpr = N_HEADS // N_KV_HEADS
    first = tl.load(row_offsets + sample)
    n_here = tl.load(row_offsets + sample + 1) - first
    stop = tl.load(key_offsets + sample + 1)
    keys = tl.load(key_offsets + sample) + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for kv_head in tl.static_range(N_KV_HEADS):
        done = 0
        while done < n_here * groups:
            index = done + tl.arange(0, BLOCK_M)
            query, pair = _load_query(
                query_ptr, first, index, n_here, kv_head, groups, N_HEADS, HEAD_DIM, BLOCK_D, EXACT
            )
            mine = index < n_here * groups
            row = first + index // groups
            ends = tl.load(ends_ptr + row, mask=mine, other=0)
            weight = tl.load(weight_ptr + row, mask=mine, other=0.0)
            lse = tl.load(lse_ptr + pair, mask=mine, other=0.0)
            scores = _logits(query, ends, key_ptr, keys, stop, kv_head, scaling, N_KV_HEADS, HEAD_DIM, BLOCK_D, EXACT)
            sums += tl.sum(tl.exp(scores - lse[:, None]) * weight[:, None], axis=0)
            done += BLOCK_M
    tl.store(sums_ptr + keys, sums / N_HEADS, mask=keys < stop)


def row_statistics(
    rows: Rows, key: Tensor, key_offsets: Tensor, marked: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.rater_attention.row_statistics`."""
    n_heads, n_kv_heads = rows.query.shape[1], key.shape[1]
    lse = torch.zeros(rows.query.shape[:2], dtype=torch.float32, device=key.device)
    mass = torch.zeros_like(lse)
    grid = (key_offsets.shape[0] - 1, n_kv_heads, triton.cdiv(rows.most * (n_heads // n_kv_heads), _BLOCK_M))
    if rows.most:
        _row_statistics[grid](
            rows.query.contiguous(), rows.offsets, rows.ends, key.contiguous(), key_offsets, marked, lse, mass,
            scaling, *_sizes(rows.query, key),
        )  # fmt: skip
    return lse, mass.mean(dim=1)


def column_sums(rows: Rows, key: Tensor, key_offsets: Tensor, lse: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """See :func:`sparsevlm.kernels.rater_attention.column_sums`."""
    sums = torch.zeros(key.shape[0], dtype=torch.float32, device=key.device)
    grid = (key_offsets.shape[0] - 1, triton.cdiv(key.shape[0], _BLOCK_N))
    if key.shape[0]:
        _column_sums[grid](
            rows.query.contiguous(), rows.offsets, rows.ends, key.contiguous(), key_offsets, lse.contiguous(),
            weight.float().contiguous(), sums, scaling, *_sizes(rows.query, key),
        )  # fmt: skip
    return sums


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int, int, int, bool]:
    head_dim = query.shape[2]
    block_d = max(16, triton.next_power_of_2(head_dim))
    # The interpreter's products of bfloat16 are wrong.
    exact = query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    return query.shape[1], key.shape[1], head_dim, block_d, _BLOCK_M, _BLOCK_N, exact
