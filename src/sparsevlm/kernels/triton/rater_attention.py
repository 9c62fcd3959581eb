"""Rows and the query heads of one key head make up one side of the products, keys the other.

Rows are either packed, sample by sample, with an end each, or filled up to one size and given by their packed indices,
behind which they see nothing.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rater_attention import Columns, PaddedRows, Rows

_BLOCK_M, _BLOCK_N = 64, 64


@triton.jit
def _load_query(
    query_ptr, row, index, n_here, kv_head, GROUPS: tl.constexpr, N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Query rows for pairs (row, head of the group)."""
    columns = tl.arange(0, BLOCK_D)
    pair = row.to(tl.int64) * N_HEADS + kv_head * GROUPS + index % GROUPS
    inside = (index < n_here * GROUPS)[:, None] & (columns < HEAD_DIM)[None, :]
    query = tl.load(query_ptr + pair[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    if EXACT:
        query = query.to(tl.float32)
    return query


@triton.jit
def _first_row(row_offsets, sample, most_rows, PADDED: tl.constexpr):
    """First row of a sample in the order of what is given out, and how many there are."""
    if PADDED:
        first, n_here = sample * most_rows, tl.load(row_offsets + sample).to(tl.int32)
    else:
        first = tl.load(row_offsets + sample)
        n_here = tl.load(row_offsets + sample + 1) - first
    return first, n_here


@triton.jit
def _rows_of(ends_ptr, sample, first, place, inside, row_stride, PADDED: tl.constexpr):
    """Rows of the query, and what is behind the last key that each sees."""
    if PADDED:
        row = tl.load(ends_ptr + sample.to(tl.int64) * row_stride + place, mask=inside, other=0)
        ends = row + 1
    else:
        row, ends = first + place, tl.load(ends_ptr + first + place, mask=inside, other=0)
    return row, ends


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
    query_ptr, row_offsets, ends_ptr, key_ptr, key_offsets, marked_ptr, lse_ptr, mass_ptr, scaling, most_rows,
    row_stride, N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr, PADDED: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    sample, kv_head = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = N_HEADS // N_KV_HEADS
    first, n_here = _first_row(row_offsets, sample, most_rows, PADDED)
    index = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = index < n_here * groups
    row, ends = _rows_of(ends_ptr, sample, first, index // groups, mine, row_stride, PADDED)
    query = _load_query(query_ptr, row, index, n_here, kv_head, groups, N_HEADS, HEAD_DIM, BLOCK_D, EXACT)
    pair = (first + index // groups) * N_HEADS + kv_head * groups + index % groups
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
        total = total * shrink + tl.sum(weights, axis=1)
        if HAS_MASS:
            marked = tl.load(marked_ptr + keys, mask=keys < stop, other=0).to(tl.float32)
            mass = mass * shrink + tl.sum(weights * marked[None, :], axis=1)
        highest = new_highest
        start += BLOCK_N
    lse, written = highest + tl.log(total), mine
    if PADDED:
        lse, written = tl.where(mine, lse, 0.0), index < most_rows * groups
    tl.store(lse_ptr + pair, lse, mask=written)
    if HAS_MASS:
        tl.store(mass_ptr + pair, tl.where(mine, mass / total, 0.0), mask=written)


@triton.jit
def _row_attention(
    query_ptr, row_offsets, ends_ptr, key_ptr, columns_ptr, numbers_ptr, lse_ptr, weight_ptr, out_ptr, most, scaling,
    most_rows, row_stride, column_stride,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr, PADDED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    groups: tl.constexpr = N_HEADS // N_KV_HEADS
    first, n_here = _first_row(row_offsets, sample, most_rows, PADDED)
    n_columns = tl.load(numbers_ptr + sample)
    index = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, known = index < n_here, place < n_columns
    row = (first + index).to(tl.int64)
    source, ends = _rows_of(ends_ptr, sample, first, index, inside, row_stride, PADDED)
    source = source.to(tl.int64)
    keys = tl.load(columns_ptr + sample.to(tl.int64) * column_stride + place, mask=known, other=0)
    seen = known[None, :] & (keys[None, :] < ends[:, None])
    dims = tl.arange(0, BLOCK_D)
    in_query, in_key = inside[:, None] & (dims < HEAD_DIM)[None, :], known[:, None] & (dims < HEAD_DIM)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    kv_head = 0
    is_asked = (tl.program_id(1) * BLOCK_M < n_here) & (tl.program_id(2) * BLOCK_N < n_columns)
    while kv_head < tl.where(is_asked, N_KV_HEADS, 0):
        key_at = (keys[:, None] * N_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        key = tl.load(key_ptr + key_at, mask=in_key, other=0.0)
        if EXACT:
            key = key.to(tl.float32)
        head = kv_head * groups
        while head < (kv_head + 1) * groups:
            at = (source * N_HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
            query = tl.load(query_ptr + at, mask=in_query, other=0.0)
            if EXACT:
                scores = tl.dot(query.to(tl.float32), tl.trans(key), input_precision="ieee") * scaling
            else:
                scores = tl.dot(query, tl.trans(key)) * scaling
            lse = tl.load(lse_ptr + row * N_HEADS + head, mask=inside, other=0.0)
            attention = tl.exp(tl.where(seen, scores - lse[:, None], float("-inf")))
            if HAS_WEIGHT:
                total += attention * tl.load(weight_ptr + sample * N_HEADS + head)
            else:
                total += attention * (1.0 / N_HEADS)
            head += 1
        kv_head += 1
    counts = inside[:, None] & known[None, :]
    written = counts
    if PADDED:
        written = (index < most_rows)[:, None] & (place < most)[None, :]
    tl.store(out_ptr + row[:, None] * most + place[None, :], tl.where(counts, total, 0.0), mask=written)


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
            scaling, 0, 0, *_sizes(rows.query, key), _BLOCK_M, _BLOCK_N, _is_exact(rows.query), False, True,
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
            columns.numbers, lse.contiguous(), weight.contiguous(), out, most, scaling, 0, 0, most,
            *_sizes(rows.query, key), block_m, _BLOCK_N, _is_exact(rows.query), False, True,
        )  # fmt: skip
    return out


def padded_statistics(
    rows: PaddedRows, key: Tensor, key_offsets: Tensor, marked: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """See :func:`sparsevlm.kernels.rater_attention.padded_statistics`."""
    (batch, most), n_heads, n_kv_heads = rows.index.shape, rows.query.shape[1], key.shape[1]
    lse = torch.empty((batch, most, n_heads), dtype=torch.float32, device=key.device)
    mass = None if marked is None else torch.empty_like(lse)
    grid = (batch, n_kv_heads, triton.cdiv(most * (n_heads // n_kv_heads), _BLOCK_M))
    if batch and most:
        _row_statistics[grid](
            rows.query.contiguous(), rows.numbers, rows.index, key.contiguous(), key_offsets,
            rows.numbers if marked is None else marked, lse, lse if mass is None else mass, scaling, most,
            rows.index.stride(0), *_sizes(rows.query, key), _BLOCK_M, _BLOCK_N, _is_exact(rows.query), True,
            marked is not None,
        )  # fmt: skip
    return lse, mass


def padded_attention(
    rows: PaddedRows, key: Tensor, columns: Columns, lse: Tensor, weight: Tensor | None, scaling: float
) -> Tensor:
    """See :func:`sparsevlm.kernels.rater_attention.padded_attention`."""
    (batch, most), most_columns = rows.index.shape, columns.keys.shape[1]
    out = torch.empty((batch, most, most_columns), dtype=torch.float32, device=key.device)
    block_m = 16 if most <= 16 else _BLOCK_M  # a prompt's last row is one
    grid = (batch, triton.cdiv(most, block_m), triton.cdiv(most_columns, _BLOCK_N))
    if batch and most and most_columns:
        _row_attention[grid](
            rows.query.contiguous(), rows.numbers, rows.index, key.contiguous(), columns.keys, columns.numbers,
            lse.contiguous(), lse if weight is None else weight.contiguous(), out, most_columns, scaling, most,
            rows.index.stride(0), columns.keys.stride(0), *_sizes(rows.query, key), block_m, _BLOCK_N,
            _is_exact(rows.query), True, weight is not None,
        )  # fmt: skip
    return out


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    head_dim = query.shape[2]
    return query.shape[1], key.shape[1], head_dim, max(16, triton.next_power_of_2(head_dim))


def _is_exact(query: Tensor) -> bool:
    """Tells whether products are taken in float32: the interpreter's of bfloat16 are wrong."""
    return query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
