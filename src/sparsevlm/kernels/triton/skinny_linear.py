"""Each program reads a block of rows of the weight, which is what takes the time: the first tile of it before it waits
for the kernel in front, whose results are the inputs.

One row of inputs is multiplied in plain arithmetic, by which it can be normalised on the way. More of them, filled up
to 16, go through the matrix units. Programs that share a block of rows leave their sums to a second kernel, which adds
them in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elementwise import Norm
from ..skinny_linear import MOST_ROWS, LinearWeights
from .dependent_launch import begins_early, gdc_launch_dependents, gdc_wait, launch_options
from .elementwise import rms_norm


@dataclass(frozen=True)
class Tiles:
    """How a product is divided.

    Attributes
    ----------
    block_n, block_k : int
        Rows of the weight, and inputs, of a tile.
    n_parts : int
        Programs that share the inputs of a block of rows, at most.
    num_warps : int
    num_stages : int
        Tiles that are under way, of several rows of inputs.
    """

    block_n: int
    block_k: int
    n_parts: int
    num_warps: int
    num_stages: int = 1


# Programs that fill a GPU, and outputs of one that joins parts.
_MANY, _JOINED = 264, 64
_MOST_PARTS = 8


def tiles_for(n_rows: int, n_products: int, n_in: int, itemsize: int) -> Tiles:
    """How a product is divided by default.

    Parameters
    ----------
    n_rows : int
        Of the inputs.
    n_products, n_in : int
        Rows and columns of the weight.
    itemsize : int
        Bytes of a number of the weight.
    """
    if n_rows == 1:
        block_n, block_k, num_warps, num_stages = 8, 2048 // itemsize, 4, 1  # 16 bytes of each row for a thread
    else:
        block_n, block_k, num_warps, num_stages = 64, 256 // itemsize, 4, 4
    n_parts = min(_MANY // triton.cdiv(n_products, block_n), n_in // (2 * block_k), _MOST_PARTS)
    return Tiles(block_n, block_k, max(1, n_parts), num_warps, num_stages)


@triton.jit
def _rows_of_block(block, n_out, BLOCK_N: tl.constexpr, IS_GATED: tl.constexpr):
    """Rows of the weight; those of gate and up take turns. Behind the last, that one again."""
    lanes = tl.arange(0, BLOCK_N)
    if IS_GATED:
        rows = tl.minimum(block * (BLOCK_N // 2) + lanes // 2, n_out - 1) + (lanes % 2) * n_out
    else:
        rows = tl.minimum(block * BLOCK_N + lanes, n_out - 1)
    return rows


@triton.jit
def _tile(at, columns, stop):
    """Some columns of the rows that begin ``at``; read once, they leave the cache first."""
    return tl.load(at + columns[None, :], mask=(columns < stop)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _finish(
    total, rows, block, scale_ptr, bias_ptr, residual_ptr, out_ptr, n_rows, n_out,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr,
):  # fmt: skip
    """From the products (ROWS, BLOCK_N) with rows of the weight to outputs."""
    dtype = out_ptr.dtype.element_ty
    if HAS_SCALE:
        total *= tl.load(scale_ptr + rows)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    WIDTH: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    if IS_GATED:
        gate, up = tl.split(tl.reshape(total.to(dtype).to(tl.float32), (ROWS, WIDTH, 2)))
        total = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * up
    samples, columns = tl.arange(0, ROWS), block * WIDTH + tl.arange(0, WIDTH)
    inside = (samples < n_rows)[:, None] & (columns < n_out)[None, :]
    at = samples[:, None] * n_out + columns[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = total.to(dtype).to(tl.float32) + residual
    tl.store(out_ptr + at, total.to(dtype), mask=inside)


@triton.jit
def _product_of_one(
    weight, x_ptr, norm_ptr, norm_scale, columns, stop, dtype: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Products of a tile with one row of inputs; what a thread holds of a row is summed."""
    x = tl.load(x_ptr + columns, mask=columns < stop, other=0.0).to(tl.float32)
    if HAS_NORM:
        norm_weight = tl.load(norm_ptr + columns, mask=columns < stop, other=0.0).to(tl.float32)
        x = ((x * norm_scale).to(dtype).to(tl.float32) * norm_weight).to(dtype).to(tl.float32)
    products = weight.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, (BLOCK_N, BLOCK_K // VECTOR, VECTOR)), axis=2)


@triton.jit
def _of_one_row(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
    n_out, n_products, n_in, stride, part_size, eps,
    HAS_NORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr, IS_SPLIT: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    rows, lanes = _rows_of_block(block, n_out, BLOCK_N, IS_GATED), tl.arange(0, BLOCK_K)
    first = part * part_size
    stop = tl.minimum(first + part_size, n_in)
    at = weight_ptr + rows.to(tl.int64)[:, None] * stride
    weight = _tile(at, first + lanes, stop)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    norm_scale = 1.0
    if HAS_NORM:
        every = tl.arange(0, SIZE)
        whole = tl.load(x_ptr + every, mask=every < n_in, other=0.0).to(tl.float32)
        norm_scale = tl.rsqrt(tl.sum(whole * whole) / n_in + eps)
    total = _product_of_one(
        weight, x_ptr, norm_ptr, norm_scale, first + lanes, stop, dtype, HAS_NORM, BLOCK_N, BLOCK_K, VECTOR
    )
    for start in range(first + BLOCK_K, stop, BLOCK_K):
        weight = _tile(at, start + lanes, stop)
        total += _product_of_one(
            weight, x_ptr, norm_ptr, norm_scale, start + lanes, stop, dtype, HAS_NORM, BLOCK_N, BLOCK_K, VECTOR
        )
    sums = tl.sum(total, axis=1)
    if IS_SPLIT:
        tl.store(parts_ptr + part * n_products + rows, sums)
    else:
        _finish(
            sums[None, :], rows, block, scale_ptr, bias_ptr, residual_ptr, out_ptr, 1, n_out,
            1, BLOCK_N, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED,
        )  # fmt: skip


@triton.jit
def _product(total, weight, x_ptr, n_rows, n_in, columns, stop, ROWS: tl.constexpr):
    """Products of a tile with the inputs, added up."""
    samples = tl.arange(0, ROWS)
    inside = (samples < n_rows)[:, None] & (columns < stop)[None, :]
    x = tl.load(x_ptr + samples[:, None] * n_in + columns[None, :], mask=inside, other=0.0)
    if weight.dtype.primitive_bitwidth == 8:
        weight = weight.to(tl.float32)  # from there to bfloat16 in pairs, which is faster than straight
    return tl.dot(x, tl.trans(weight.to(x.dtype)), total, input_precision="ieee")


@triton.jit(do_not_specialize=["n_rows"])
def _of_rows(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, parts_ptr,
    n_rows, n_out, n_products, n_in, stride, part_size,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr,
    IS_SPLIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    rows, lanes = _rows_of_block(block, n_out, BLOCK_N, IS_GATED), tl.arange(0, BLOCK_K)
    first = part * part_size
    stop = tl.minimum(first + part_size, n_in)
    at = weight_ptr + rows.to(tl.int64)[:, None] * stride
    weight = _tile(at, first + lanes, stop)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    total = _product(total, weight, x_ptr, n_rows, n_in, first + lanes, stop, ROWS)
    for start in tl.range(first + BLOCK_K, stop, BLOCK_K, num_stages=STAGES):
        weight = _tile(at, start + lanes, stop)
        total = _product(total, weight, x_ptr, n_rows, n_in, start + lanes, stop, ROWS)
    if IS_SPLIT:
        samples = tl.arange(0, ROWS)
        out = (part * ROWS + samples)[:, None] * n_products + rows[None, :]
        tl.store(parts_ptr + out, total, mask=(samples < n_rows)[:, None])
    else:
        _finish(
            total, rows, block, scale_ptr, bias_ptr, residual_ptr, out_ptr, n_rows, n_out,
            ROWS, BLOCK_N, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _join(
    parts_ptr, scale_ptr, bias_ptr, residual_ptr, out_ptr, n_rows, n_out, n_products, n_parts,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_GATED: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = _rows_of_block(block, n_out, BLOCK_N, IS_GATED)
    parts, samples = tl.arange(0, PARTS)[:, None, None], tl.arange(0, ROWS)[None, :, None]
    at = (parts * ROWS + samples) * n_products + rows[None, None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.sum(tl.load(parts_ptr + at, mask=(parts < n_parts) & (samples < n_rows), other=0.0), axis=0)
    _finish(
        total, rows, block, scale_ptr, bias_ptr, residual_ptr, out_ptr, n_rows, n_out,
        ROWS, BLOCK_N, HAS_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED,
    )  # fmt: skip


def skinny_linear(
    x: Tensor, weights: LinearWeights, norm: Norm | None, residual: Tensor | None, gated: bool,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`sparsevlm.kernels.skinny_linear.skinny_linear`; divided by ``tiles`` instead of :func:`tiles_for`."""
    (n_rows, n_in), (n_products, stride) = x.shape, (weights.weight.shape[0], weights.weight.stride(0))
    if n_rows > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS} rows, got {n_rows}.")
    if norm is not None and n_rows > 1:
        x, norm = rms_norm(x, norm.weight, norm.eps, None)[0], None
    x, early, itemsize = x.contiguous(), begins_early(x), weights.weight.element_size()
    tiles = tiles or tiles_for(n_rows, n_products, n_in, itemsize)
    n_out, rows = n_products // 2 if gated else n_products, 1 if n_rows == 1 else MOST_ROWS
    part_size = triton.cdiv(triton.cdiv(n_in, tiles.n_parts), tiles.block_k) * tiles.block_k
    n_parts = triton.cdiv(n_in, part_size)
    out = torch.empty((n_rows, n_out), dtype=x.dtype, device=x.device)
    parts = out if n_parts == 1 else torch.empty((n_parts, rows, n_products), dtype=torch.float32, device=x.device)
    behind = (weights.scale, weights.bias, None if residual is None else residual.contiguous())
    flags = (*(tensor is not None for tensor in behind), gated)
    pointers = (*(out if tensor is None else tensor for tensor in behind), out)
    grid, options = (triton.cdiv(n_products, tiles.block_n), n_parts), launch_options(early)
    if n_rows == 1:
        norm_weight, eps = (out, 0.0) if norm is None else (norm.weight, norm.eps)
        size = 1 if norm is None else triton.next_power_of_2(n_in)
        _of_one_row[grid](
            x, norm_weight, weights.weight, *pointers, parts, n_out, n_products, n_in, stride, part_size, eps,
            norm is not None, *flags, n_parts > 1, size, tiles.block_n, tiles.block_k, 16 // itemsize, early,
            num_warps=tiles.num_warps, **options,
        )  # fmt: skip
    else:
        _of_rows[grid](
            x, weights.weight, *pointers, parts, n_rows, n_out, n_products, n_in, stride, part_size,
            *flags, n_parts > 1, rows, tiles.block_n, tiles.block_k, tiles.num_stages, early,
            num_warps=tiles.num_warps, **options,
        )  # fmt: skip
    if n_parts > 1:
        _join[(triton.cdiv(n_products, _JOINED),)](
            parts, *pointers, n_rows, n_out, n_products, n_parts, *flags,
            triton.next_power_of_2(n_parts), rows, _JOINED, early, **options,
        )  # fmt: skip
    return out
