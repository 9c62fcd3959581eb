"""One program per row. Arithmetic in float32, rounded where the plain function rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elementwise import Norm
from .dependent_launch import begins_early, gdc_launch_dependents, gdc_wait, launch_options

# So few rows are new tokens, whose kernels follow each other closely.
_NEW_TOKENS = 16


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, size, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(sum_ptr + row + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row + columns, (weight * scaled).to(dtype), mask=inside)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.elementwise.rms_norm`."""
    hidden = hidden.contiguous()
    size = hidden.shape[-1]
    out = torch.empty_like(hidden)
    total = hidden if residual is None else torch.empty_like(hidden)
    n_rows = hidden.numel() // size
    if n_rows:
        other = hidden if residual is None else residual.contiguous()
        block = triton.next_power_of_2(size)
        warps = 8 if block > 2048 else 4
        early = n_rows <= _NEW_TOKENS and begins_early(hidden)
        _rms_norm[(n_rows,)](
            hidden, other, weight, out, total, size, eps, residual is not None, block, early,
            num_warps=warps, **launch_options(early),
        )  # fmt: skip
    return out, total


_BLOCK = 1024


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, size, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (active * up).to(dtype), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.elementwise.swiglu`."""
    n_rows, size = gate.shape
    out = torch.empty((n_rows, size), dtype=gate.dtype, device=gate.device)
    if n_rows:
        grid = (n_rows, triton.cdiv(size, _BLOCK))
        _swiglu[grid](gate, up, out, size, gate.stride(0), up.stride(0), _BLOCK)
    return out


# So few programs do not fill a GPU with a warp each.
_FEW_ROWS = 256


@triton.jit
def _turn(
    x_ptr, out_ptr, cos_a, cos_b, sin_a, sin_b, weight_ptr, eps, N_HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    heads, columns = tl.arange(0, triton.next_power_of_2(N_HEADS))[:, None], tl.arange(0, BLOCK)[None, :]
    at = heads * 2 * HALF + columns
    inside = (heads < N_HEADS) & (columns < HALF)
    dtype = out_ptr.dtype.element_ty
    a = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        weight_a = tl.load(weight_ptr + columns, mask=columns < HALF, other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + columns + HALF, mask=columns < HALF, other=0.0).to(tl.float32)
        a = (weight_a * (a * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        b = (weight_b * (b * scale).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out_ptr + at, (a * cos_a - b * sin_a).to(dtype), mask=inside)
    tl.store(out_ptr + at + HALF, (b * cos_b + a * sin_b).to(dtype), mask=inside)


@triton.jit
def _rotate(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, query_out, key_out, value_out, slot_ptr, query_weight, key_weight,
    query_stride, key_stride, value_stride, kept_stride, eps,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HAS_VALUE: tl.constexpr, HAS_SLOT: tl.constexpr, HAS_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    table = row * 2 * HALF + columns
    cos_a = tl.load(cos_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_row = query_out + row * 2 * HALF * N_HEADS
    _turn(
        query_ptr + row * query_stride, out_row, cos_a, cos_b, sin_a, sin_b, query_weight, eps, N_HEADS, HALF, BLOCK,
        HAS_NORM,
    )  # fmt: skip
    kept = row * kept_stride
    if HAS_SLOT:
        kept += tl.load(slot_ptr) * 2 * HALF * N_KV_HEADS
    _turn(
        key_ptr + row * key_stride, key_out + kept, cos_a, cos_b, sin_a, sin_b, key_weight, eps, N_KV_HEADS, HALF,
        BLOCK, HAS_NORM,
    )  # fmt: skip
    if HAS_VALUE:
        SIZE: tl.constexpr = triton.next_power_of_2(2 * HALF * N_KV_HEADS)
        whole = tl.arange(0, SIZE)
        there = whole < 2 * HALF * N_KV_HEADS
        tl.store(value_out + kept + whole, tl.load(value_ptr + row * value_stride + whole, mask=there), mask=there)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.elementwise.rotate`."""
    key_out = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    return _launch(query, key, None, cos, sin, key_out, key_out, None), key_out


def rotate_into(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slot: Tensor | None, norms: tuple[Norm, Norm] | None = None,
) -> Tensor:  # fmt: skip
    """See :func:`sparsevlm.kernels.elementwise.rotate_into`."""
    return _launch(query, key, value, cos, sin, keys, values, slot, norms)


def _launch(
    query: Tensor, key: Tensor, value: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    slot: Tensor | None, norms: tuple[Norm, Norm] | None = None,
) -> Tensor:  # fmt: skip
    n_rows, n_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if n_rows:
        half, given = head_dim // 2, key if value is None else value
        early = slot is not None and begins_early(query)
        weights, eps = (out, out) if norms is None else tuple(norm.weight for norm in norms), 0.0
        if norms is not None:
            eps = norms[0].eps
            if norms[1].eps != eps:
                raise ValueError(f"queries and keys are normed with one eps, got {eps} and {norms[1].eps}.")
        _rotate[(n_rows,)](
            _with_close_heads(query), _with_close_heads(key), _with_close_heads(given), cos.contiguous(),
            sin.contiguous(), out, keys, values, out if slot is None else slot, *weights,
            query.stride(0), key.stride(0), given.stride(0), keys.stride(0), eps,
            n_heads, key.shape[1], half, triton.next_power_of_2(half), value is not None, slot is not None,
            norms is not None, early,
            num_warps=4 if n_rows <= _FEW_ROWS else 1, **launch_options(early),
        )  # fmt: skip
    return out


def _with_close_heads(x: Tensor) -> Tensor:
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"heads must lie one behind the other, got strides {x.stride()} for shape {tuple(x.shape)}.")
    return x
