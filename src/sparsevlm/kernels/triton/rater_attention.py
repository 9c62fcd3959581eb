"""Rows and the query heads of one key head make up one side of the products, keys the other."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rater_attention import Columns, Rows

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
def _row_attention(
    query_ptr, row_offsets, ends_ptr, key_ptr, columns_ptr, numbers_ptr, lse_ptr, weight_ptr, out_ptr, most, scaling,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    groups: tl.constexpr = N_HEADS // N_KV_HEADS
    first = tl.load(row_offsets + sample)
    n_here = tl.load(row_offsets + sample + 1) - first
    index = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, known = index < n_here, place < tl.load(numbers_ptr + sample)
    row = (first + index).to(tl.int64)
    ends = tl.load(ends_ptr + row, mask=inside, other=0)
    keys = tl.load(columns_ptr + sample.to(tl.int64) * most + place, mask=known, other=0)
    seen = known[None, :] & (keys[None, :] < ends[:, None])
    dims = tl.arange(0, BLOCK_D)
    in_query, in_key = inside[:, None] & (dims < HEAD_DIM)[None, :], known[:, None] & (dims < HEAD_DIM)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    kv_head = 0
    while kv_head < tl.where(tl.program_id(1) * BLOCK_M < n_here, N_KV_HEADS, 0):
        key_at = (keys[:, None] * N_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        key = tl.load(key_ptr + key_at, mask=in_key, other=0.0)
        if EXACT:
            key = key.to(tl.float32)
        head = kv_head * groups
        while head < (kv_head + 1) * groups:
            at = (row * N_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
            query = tl.load(query_ptr + at, mask=in_query, other=0.0)
            if EXACT:
                scores = tl.dot(query.to(tl.float32), tl.trans(key), input_precision="ieee") * scaling
            else:
                scores = tl.dot(query, tl.trans(key)) * scaling
            lse = tl.load(lse_ptr + row * N_HEADS + head, mask=inside, other=0.0)
            attention = tl.exp(tl.where(seen, scores - lse[:, None], float("-inf")))
            total += attention * tl.load(weight_ptr + sample * N_HEADS + head)
            head += 1
        kv_head += 1
    tl.store(out_ptr + row[:, None] * most + place[None, :], total, mask=inside[:, None] & known[None, :])


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
            rows.query.contiguous(), rows.cu_seqlens, rows.ends, key.contiguous(), key_offsets, marked, lse, mass,
            scaling, *_sizes(rows.query, key), _BLOCK_M, _BLOCK_N, _is_exact(rows.query),
        )  # fmt: skip
    return lse, mass


def row_attention(rows: Rows, key: Tensor, columns: Columns, lse: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """See :func:`sparsevlm.kernels.rater_attention.row_attention`."""
    batch, most = columns.keys.shape
    out = torch.zeros((rows.query.shape[0], most), dtype=torch.float32, device=key.device)
    block_m = 16 if rows.most <= 16 else _BLOCK_M  # a prompt's last row is one
    grid = (batch, triton.cdiv(rows.most, block_m), triton.cdiv(most, _BLOCK_N))
    if rows.most and most:
        _row_attention[grid](
            rows.query.contiguous(), rows.cu_seqlens, rows.ends, key.contiguous(), columns.keys.contiguous(),
            columns.numbers, lse.contiguous(), weight.contiguous(), out, most, scaling,
            *_sizes(rows.query, key), block_m, _BLOCK_N, _is_exact(rows.query),
        )  # fmt: skip
    return out


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    head_dim = query.shape[2]
    return query.shape[1], key.shape[1], head_dim, max(16, triton.next_power_of_2(head_dim))


def _is_exact(query: Tensor) -> bool:
    """Tells whether products are taken in float32: the interpreter's of bfloat16 are wrong."""
    return query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
