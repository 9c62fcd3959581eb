"""Split-KV: each program reads a part of one sample's keys for the query heads that share a key head, a second kernel
joins the parts. The number of programs follows the room, not the lengths, which stay on the device: programs behind
the last row end at once."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import RaggedCache
from .dependent_launch import begins_early, gdc_launch_dependents, gdc_wait, launch_options

_BLOCK = 64
_LEAST_ROWS = 64  # of a part: fewer do not pay for a program
_MOST_PARTS = 64


@triton.jit
def _read(
    query, highest, total, mixed, key_ptr, value_ptr, start, stop, stride, scaling,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Streaming softmax over the rows ``start`` to ``stop``."""
    columns = tl.arange(0, BLOCK_D)
    while start < stop:
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < stop)[:, None] & (columns < HEAD_DIM)[None, :]
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        key = tl.load(key_ptr + at, mask=inside, other=0.0)
        value = tl.load(value_ptr + at, mask=inside, other=0.0)
        if EXACT:
            key, value = key.to(tl.float32), value.to(tl.float32)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scaling
        else:
            scores = tl.dot(query, tl.trans(key)) * scaling
        scores = tl.where((rows < stop)[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp(scores - new_highest[:, None])
        shrink = tl.exp(highest - new_highest)
        total = total * shrink + tl.sum(weights, axis=1)
        if EXACT:
            mixed = mixed * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
        else:
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(value.dtype), value)
        highest = new_highest
        start += BLOCK
    return highest, total, mixed


@triton.jit
def _part_size(n_rows, n_parts, BLOCK: tl.constexpr):
    return tl.cdiv(tl.cdiv(n_rows, n_parts), BLOCK) * BLOCK


@triton.jit
def _attend(
    query_ptr, prompt_keys, prompt_values, offsets_ptr, new_keys, new_values, n_new_ptr, mixed_ptr, stats_ptr,
    room, n_parts, scaling, N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    sample, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    groups: tl.constexpr = N_HEADS // N_KV_HEADS
    heads, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    inside = (heads < groups)[:, None] & (columns < HEAD_DIM)[None, :]
    head = sample * N_HEADS + kv_head * groups + heads
    query = tl.load(query_ptr + head[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    if EXACT:
        query = query.to(tl.float32)
    first = tl.load(offsets_ptr + sample)
    n_prompt = tl.load(offsets_ptr + sample + 1) - first
    n_rows = n_prompt + tl.load(n_new_ptr)
    size = _part_size(n_rows, n_parts, BLOCK)
    start, stop = part * size, tl.minimum((part + 1) * size, n_rows)
    if start >= n_rows:
        return
    highest = tl.full([BLOCK_H], -1e30, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mixed = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    stride: tl.constexpr = N_KV_HEADS * HEAD_DIM
    head_at = kv_head * HEAD_DIM
    prompt_at = first.to(tl.int64) * stride + head_at
    highest, total, mixed = _read(
        query, highest, total, mixed, prompt_keys + prompt_at, prompt_values + prompt_at,
        start, tl.minimum(stop, n_prompt), stride, scaling, HEAD_DIM, BLOCK_D, BLOCK, EXACT,
    )  # fmt: skip
    new_at = sample.to(tl.int64) * room * stride + head_at
    highest, total, mixed = _read(
        query, highest, total, mixed, new_keys + new_at, new_values + new_at,
        tl.maximum(start - n_prompt, 0), stop - n_prompt, stride, scaling, HEAD_DIM, BLOCK_D, BLOCK, EXACT,
    )  # fmt: skip
    out = (head * n_parts + part).to(tl.int64)
    tl.store(mixed_ptr + out[:, None] * HEAD_DIM + columns[None, :], mixed, mask=inside)
    tl.store(stats_ptr + out * 2, highest, mask=heads < groups)
    tl.store(stats_ptr + out * 2 + 1, total, mask=heads < groups)


@triton.jit
def _join(
    mixed_ptr, stats_ptr, out_ptr, offsets_ptr, n_new_ptr, n_parts, N_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(0) // N_HEADS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    parts, columns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    n_rows = tl.load(offsets_ptr + sample + 1) - tl.load(offsets_ptr + sample) + tl.load(n_new_ptr)
    written = (parts < n_parts) & (parts * _part_size(n_rows, n_parts, BLOCK) < n_rows)
    highest = tl.load(stats_ptr + (head * n_parts + parts) * 2, mask=written, other=-1e30)
    total = tl.load(stats_ptr + (head * n_parts + parts) * 2 + 1, mask=written, other=0.0)
    weight = tl.exp(highest - tl.max(highest, axis=0))
    inside = written[:, None] & (columns < HEAD_DIM)[None, :]
    mixed = tl.load(mixed_ptr + (head * n_parts + parts)[:, None] * HEAD_DIM + columns[None, :], mask=inside, other=0.0)
    out = tl.sum(mixed * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out_ptr + head * HEAD_DIM + columns, out.to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


def decode_attention(query: Tensor, cache: RaggedCache, scaling: float) -> Tensor:
    """See :func:`sparsevlm.kernels.attention.decode_attention`."""
    batch, n_heads, head_dim = query.shape
    room, n_kv_heads = cache.new_keys.shape[1:3]
    n_parts = max(1, min(_MOST_PARTS, (cache.prompt_keys.shape[0] + room) // _LEAST_ROWS))
    mixed = torch.empty((batch, n_heads, n_parts, head_dim), dtype=torch.float32, device=query.device)
    stats = torch.empty((batch, n_heads, n_parts, 2), dtype=torch.float32, device=query.device)
    out = torch.empty((batch, n_heads, head_dim), dtype=query.dtype, device=query.device)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_h = max(16, triton.next_power_of_2(n_heads // n_kv_heads))
    # The interpreter's products of bfloat16 are wrong.
    exact = query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    early = begins_early(query)
    _attend[(batch, n_kv_heads, n_parts)](
        query.contiguous(), cache.prompt_keys, cache.prompt_values, cache.cu_seqlens, cache.new_keys, cache.new_values,
        cache.n_new, mixed, stats, room, n_parts, scaling, n_heads, n_kv_heads, head_dim, block_h, block_d, _BLOCK,
        exact, early, num_warps=4, **launch_options(early),
    )  # fmt: skip
    _join[(batch * n_heads,)](
        mixed, stats, out, cache.cu_seqlens, cache.n_new, n_parts, n_heads, head_dim,
        triton.next_power_of_2(n_parts), block_d, _BLOCK, early, num_warps=2, **launch_options(early),
    )  # fmt: skip
    return out
