"""Two passes: log-sum-exp of each row, then sums over the rows for each column; of every head apart, added at the end.

Programs share out packed rows, whatever sequences these are of: each row comes with the bounds of its own. Blocks that
lie whole in the one sequence of a program's rows, nearly all where sequences are long, need no mask.
"""

from __future__ import annotations

import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_N, _WARPS = 64, 8
# Behind all rows; a loop that looks some blocks ahead of it must not come out below 0.
_BEHIND_ALL = 2**30


@triton.jit
def _load(
    tensor_ptr, rows, n_rows, stride, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Rows of a head in two parts, since products take powers of two: 80 columns are 64 and 16, not 128."""
    columns = tl.arange(0, FIRST)
    at = tensor_ptr + rows.to(tl.int64)[:, None] * stride
    inside = (rows < n_rows)[:, None]
    if FIRST > HEAD_DIM:
        first = tl.load(at + columns[None, :], mask=inside & (columns < HEAD_DIM)[None, :], other=0.0)
    else:
        first = tl.load(at + columns[None, :], mask=inside, other=0.0)
    rest = first
    if REST > 0:
        others = FIRST + tl.arange(0, REST)
        if FIRST + REST > HEAD_DIM:
            rest = tl.load(at + others[None, :], mask=inside & (others < HEAD_DIM)[None, :], other=0.0)
        else:
            rest = tl.load(at + others[None, :], mask=inside, other=0.0)
    if EXACT:
        first, rest = first.to(tl.float32), rest.to(tl.float32)
    return first, rest


@triton.jit
def _products(left, left_rest, right, right_rest, REST: tl.constexpr):
    """Exact ones where both sides are float32."""
    scores = tl.dot(left, tl.trans(right), input_precision="ieee")
    if REST > 0:
        scores = tl.dot(left_rest, tl.trans(right_rest), scores, input_precision="ieee")
    return scores


@triton.jit
def _spans(starts, ends, BEHIND_ALL: tl.constexpr, BLOCK: tl.constexpr):
    """First and last of what some rows may look at, and up to where blocks of it need no mask."""
    alive = starts < ends
    first = tl.min(tl.where(alive, starts, BEHIND_ALL), axis=0)
    last = tl.max(tl.where(alive, ends, 0), axis=0)
    is_one = tl.max(tl.where(alive, starts, 0), axis=0) == first
    return first, tl.where(is_one, first + (last - first) // BLOCK * BLOCK, first), last


@triton.jit
def _add_exponentials(scores, scaling, highest, total):
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scaling)
    total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(scores * scaling - new_highest[:, None]), axis=1)
    return new_highest, total


@triton.jit
def _row_lse(
    query_ptr, key_ptr, starts_ptr, ends_ptr, lse_ptr, n_rows, query_stride, query_head_stride, key_stride,
    key_head_stride, scaling, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BEHIND_ALL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of each row, to the base of 2."""
    head = tl.program_id(1).to(tl.int64)
    query_of_head = query_ptr + head * (query_head_stride * UNIT)
    key_of_head = key_ptr + head // GROUPS * (key_head_stride * UNIT)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    starts = tl.load(starts_ptr + rows, mask=rows < n_rows, other=0)
    ends = tl.load(ends_ptr + rows, mask=rows < n_rows, other=0)
    query, query_rest = _load(query_of_head, rows, n_rows, query_stride * UNIT, HEAD_DIM, FIRST, REST, EXACT)
    first, inner, last = _spans(starts, ends, BEHIND_ALL, BLOCK_N)
    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, inner, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key, key_rest = _load(key_of_head, keys, n_rows, key_stride * UNIT, HEAD_DIM, FIRST, REST, EXACT)
        scores = _products(query, query_rest, key, key_rest, REST)
        highest, total = _add_exponentials(scores, scaling, highest, total)
    for start in range(inner, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key, key_rest = _load(key_of_head, keys, n_rows, key_stride * UNIT, HEAD_DIM, FIRST, REST, EXACT)
        scores = _products(query, query_rest, key, key_rest, REST)
        seen = (keys[None, :] >= starts[:, None]) & (keys[None, :] < ends[:, None])
        highest, total = _add_exponentials(tl.where(seen, scores, float("-inf")), scaling, highest, total)
    lse = highest + tl.log2(tl.where(starts < ends, total, 1.0))
    tl.store(lse_ptr + head * n_rows + rows, lse, mask=rows < n_rows)


@triton.jit
def _column_sums(
    query_ptr, key_ptr, starts_ptr, ends_ptr, lse_ptr, sums_ptr, n_rows, query_stride, query_head_stride, key_stride,
    key_head_stride, scaling, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BEHIND_ALL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``Σ_i exp(s_ij − lse_i)`` for each column j, the rows i of its sequence one block after the other."""
    head = tl.program_id(1).to(tl.int64)
    query_of_head = query_ptr + head * (query_head_stride * UNIT)
    key_of_head = key_ptr + head // GROUPS * (key_head_stride * UNIT)
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    starts = tl.load(starts_ptr + columns, mask=columns < n_rows, other=0)
    ends = tl.load(ends_ptr + columns, mask=columns < n_rows, other=0)
    key, key_rest = _load(key_of_head, columns, n_rows, key_stride * UNIT, HEAD_DIM, FIRST, REST, EXACT)
    first, inner, last = _spans(starts, ends, BEHIND_ALL, BLOCK_N)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, inner, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        query, query_rest = _load(query_of_head, rows, n_rows, query_stride * UNIT, HEAD_DIM, FIRST, REST, EXACT)
        lse = tl.load(lse_ptr + head * n_rows + rows)
        scores = _products(key, key_rest, query, query_rest, REST)
        sums += tl.sum(tl.exp2(scores * scaling - lse[None, :]), axis=1)
    for start in range(inner, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        query, query_rest = _load(query_of_head, rows, n_rows, query_stride * UNIT, HEAD_DIM, FIRST, REST, EXACT)
        lse = tl.load(lse_ptr + head * n_rows + rows, mask=rows < n_rows, other=0.0)
        scores = _products(key, key_rest, query, query_rest, REST)
        seen = (rows[None, :] >= starts[:, None]) & (rows[None, :] < ends[:, None])
        sums += tl.sum(tl.exp2(tl.where(seen, scores * scaling - lse[None, :], float("-inf"))), axis=1)
    tl.store(sums_ptr + head * n_rows + columns, tl.where(starts < ends, sums, 0.0), mask=columns < n_rows)


def received_attention(query: Tensor, key: Tensor, cu_seqlens: Tensor, scaling: float) -> Tensor:
    """See :func:`sparsevlm.kernels.received_attention.received_attention`."""
    n_rows, n_heads, head_dim = query.shape
    if not n_rows:
        return torch.zeros(0, dtype=torch.float32, device=query.device)
    query, key = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key))
    strides = (*query.stride()[:2], *key.stride()[:2])
    unit = math.gcd(8, *strides)  # rows that begin at multiples of 16 bytes are read in pieces as long
    lse, sums = (torch.empty((n_heads, n_rows), dtype=torch.float32, device=query.device) for _ in range(2))
    # The interpreter's products of bfloat16 are wrong.
    exact = query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    block_m, n_stages = (32, 2) if exact else (128, 3)
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = 0 if first >= head_dim else max(16, triton.next_power_of_2(head_dim - first))
    bounds = _bounds_of_rows(n_rows, cu_seqlens)
    sizes = (*(stride // unit for stride in strides), scaling * math.log2(math.e))
    variant = (n_heads // key.shape[1], head_dim, first, rest, unit, block_m, _BLOCK_N, _BEHIND_ALL, exact)
    grid = (triton.cdiv(n_rows, block_m), n_heads)
    launch = {"num_warps": _WARPS, "num_stages": n_stages}
    with torch.cuda.device_of(query):  # hooks ask from whatever device is current
        _row_lse[grid](query, key, *bounds, lse, n_rows, *sizes, *variant, **launch)
        _column_sums[grid](query, key, *bounds, lse, sums, n_rows, *sizes, *variant, **launch)
    return sums.mean(dim=0)


def _bounds_of_rows(n_rows: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row, exclusive, of the sequence of each row; the same twice behind the last sequence."""
    rows = torch.arange(n_rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    n_begun = torch.searchsorted(cu_seqlens, rows, right=True)
    edges = torch.cat([cu_seqlens, cu_seqlens[-1:]])
    return edges[n_begun - 1], edges[n_begun]
