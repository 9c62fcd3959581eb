"""One program per row: all heads of queries, then of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(x_ptr, out_ptr, cos_a, cos_b, sin_a, sin_b, N_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    heads, columns = tl.arange(0, triton.next_power_of_2(N_HEADS))[:, None], tl.arange(0, BLOCK)[None, :]
    at = heads * 2 * HALF + columns
    inside = (heads < N_HEADS) & (columns < HALF)
    dtype = out_ptr.dtype.element_ty
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (a * cos_a - b * sin_a).to(dtype), mask=inside)
    tl.store(out_ptr + at + HALF, (b * cos_b + a * sin_b).to(dtype), mask=inside)


@triton.jit
def _rotate(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out, key_out, query_stride, key_stride,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    table = row * 2 * HALF + columns
    cos_a = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_row = row * 2 * HALF
    _turn(
        query_ptr + row * query_stride, query_out + out_row * N_HEADS, cos_a, cos_b, sin_a, sin_b, N_HEADS, HALF, BLOCK
    )
    _turn(
        key_ptr + row * key_stride, key_out + out_row * N_KV_HEADS, cos_a, cos_b, sin_a, sin_b, N_KV_HEADS, HALF, BLOCK
    )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.rotary.rotate`."""
    n_rows, n_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    if n_rows:
        half = head_dim // 2
        _rotate[(n_rows,)](
            _with_close_heads(query), _with_close_heads(key), cos.contiguous(), sin.contiguous(), out, key_out,
            query.stride(0), key.stride(0), n_heads, key.shape[1], half, triton.next_power_of_2(half), num_warps=1,
        )  # fmt: skip
    return out, key_out


def _with_close_heads(x: Tensor) -> Tensor:
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"heads must lie one behind the other, got strides {x.stride()} for shape {tuple(x.shape)}.")
    return x
