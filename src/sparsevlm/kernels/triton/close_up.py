"""A program for every sample finds where its rows go, one more does for what fills up; then the rows move.

A program reads only what it alone writes: its rows, its tokens, and how many tokens all samples lose, which it counts
by itself. What others read, the bounds of the samples, is written by the kernel that moves the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..close_up import Packed

_BLOCK, _WARPS = 1024, 4
_MOST_COLUMNS = 4096


@triton.jit
def _count_dropped(is_kept_ptr, n_visual_ptr, sample, batch, most_visual, BLOCK: tl.constexpr):
    """Visual tokens that are dropped, of the samples before one and of all."""
    before, everything = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, batch * most_visual, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside, owner = at < batch * most_visual, at // most_visual
        n_visual = tl.load(n_visual_ptr + owner, mask=inside, other=0)
        kept = tl.load(is_kept_ptr + at, mask=inside, other=1) != 0
        dropped = (inside & (at % most_visual < n_visual) & (kept == 0)).to(tl.int32)
        before += tl.where(owner < sample, dropped, 0)
        everything += dropped
    return tl.sum(before, axis=0), tl.sum(everything, axis=0)


@triton.jit
def _place_rows(
    visual_rows, is_kept, n_visual, first, stop, before, behind, source_ptr, place_ptr, BLOCK: tl.constexpr
):
    """Writes where the rows of a sample go and which row comes there; the places hold flags before."""
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(place_ptr + row, row * 0, mask=row < stop)
    tl.debug_barrier()
    for start in range(0, n_visual, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = tl.load(is_kept + at, mask=at < n_visual, other=1) != 0
        dropped = (at < n_visual) & (kept == 0)
        row = tl.load(visual_rows + at, mask=dropped, other=0)
        tl.store(place_ptr + row, at * 0 + 1, mask=dropped)
    tl.debug_barrier()
    count = before
    for start in range(first, stop, BLOCK):
        row = start + tl.arange(0, BLOCK)
        dropped = tl.load(place_ptr + row, mask=row < stop, other=0)
        n_before = count + tl.cumsum(dropped, axis=0) - dropped
        place = tl.where(dropped != 0, behind + n_before, row - n_before)
        tl.debug_barrier()
        tl.store(place_ptr + row, place, mask=row < stop)
        tl.store(source_ptr + place, row, mask=row < stop)
        count += tl.sum(dropped, axis=0)
    tl.debug_barrier()


@triton.jit
def _close_tokens(
    visual_rows, alive, image_idx, is_kept, chosen, place_ptr, n_visual, n_keep, most_visual, most, BLOCK: tl.constexpr
):
    """Brings the kept tokens to the front: they never overtake what is still to be read."""
    first_row, first_alive, first_image = tl.load(visual_rows), tl.load(alive), tl.load(image_idx)
    first_row = tl.load(place_ptr + first_row, mask=n_visual > 0, other=0)
    count = 0
    for start in range(0, most_visual, BLOCK):
        at = start + tl.arange(0, BLOCK)
        kept = tl.load(is_kept + at, mask=at < most_visual, other=0) != 0
        row = tl.load(visual_rows + at, mask=kept, other=0)
        own_alive, own_image = tl.load(alive + at, mask=kept, other=0), tl.load(image_idx + at, mask=kept, other=0)
        row = tl.load(place_ptr + row, mask=kept, other=0)
        place = count + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        fits = kept & (place < most)
        tl.store(chosen + place, at.to(tl.int64), mask=fits)
        tl.store(visual_rows + place, tl.where(place < n_keep, row, 0).to(tl.int64), mask=fits)
        tl.store(alive + place, own_alive, mask=fits)
        tl.store(image_idx + place, own_image, mask=fits)
        count += tl.sum(kept.to(tl.int32), axis=0)
    tl.debug_barrier()
    for start in range(count, most, BLOCK):  # as the first token, which fills up
        at = start + tl.arange(0, BLOCK)
        tl.store(chosen + at, at.to(tl.int64) * 0, mask=at < most)
        tl.store(visual_rows + at, tl.where(at < n_keep, first_row, 0).to(tl.int64), mask=at < most)
        tl.store(alive + at, tl.zeros([BLOCK], tl.int64) + first_alive, mask=at < most)
        tl.store(image_idx + at, tl.zeros([BLOCK], tl.int64) + first_image, mask=at < most)


@triton.jit(do_not_specialize=["batch"])
def _close_up(
    is_kept_ptr, n_keep_ptr, cu_seqlens_ptr, n_visual_ptr, visual_rows_ptr, alive_ptr, image_ptr, n_text_ptr,
    text_rows_ptr, chosen_ptr, source_ptr, place_ptr, new_cu_seqlens_ptr, batch, most_visual, most, most_text, n_rows,
    row_stride, alive_stride, image_stride, text_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    is_sample = sample < batch
    first = tl.load(cu_seqlens_ptr + sample)
    stop = tl.load(cu_seqlens_ptr + sample + 1, mask=is_sample, other=0)
    stop = tl.where(is_sample, stop, n_rows)
    n_visual = tl.load(n_visual_ptr + sample, mask=is_sample, other=0).to(tl.int32)
    n_keep = tl.load(n_keep_ptr + sample, mask=is_sample, other=0).to(tl.int32)
    before, everything = _count_dropped(is_kept_ptr, n_visual_ptr, sample, batch, most_visual, BLOCK)
    own = sample.to(tl.int64)
    is_kept, visual_rows = is_kept_ptr + own * most_visual, visual_rows_ptr + own * row_stride
    _place_rows(
        visual_rows, is_kept, n_visual, first, stop, before, n_rows - everything, source_ptr, place_ptr, BLOCK
    )  # fmt: skip
    if is_sample:
        _close_tokens(
            visual_rows, alive_ptr + own * alive_stride, image_ptr + own * image_stride, is_kept,
            chosen_ptr + own * most, place_ptr, n_visual, n_keep, most_visual, most, BLOCK,
        )  # fmt: skip
        n_text = tl.load(n_text_ptr + sample)
        for start in range(0, most_text, BLOCK):
            at = start + tl.arange(0, BLOCK)
            row = tl.load(text_rows_ptr + own * text_stride + at, mask=(at < most_text) & (at < n_text), other=0)
            row = tl.load(place_ptr + row, mask=(at < most_text) & (at < n_text), other=0)
            tl.store(text_rows_ptr + own * text_stride + at, row.to(tl.int64), mask=at < most_text)
        lost = tl.zeros([BLOCK], tl.int64)
        for start in range(0, sample + 1, BLOCK):
            at = start + tl.arange(0, BLOCK)
            lost += tl.load(n_visual_ptr + at, mask=at <= sample, other=0)
            lost -= tl.load(n_keep_ptr + at, mask=at <= sample, other=0)
        tl.store(new_cu_seqlens_ptr + sample + 1, stop - tl.sum(lost, axis=0).to(tl.int32))
    else:
        tl.store(new_cu_seqlens_ptr, 0)


@triton.jit
def _copy(from_ptr, from_row, to_ptr, to_row, size, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(from_ptr + from_row.to(tl.int64) * size + at, mask=at < size)
        tl.store(to_ptr + to_row.to(tl.int64) * size + at, values, mask=at < size)


@triton.jit(do_not_specialize=["batch"])
def _set_aside(
    source_ptr, hidden_ptr, cos_ptr, sin_ptr, new_hidden_ptr, new_cos_ptr, new_sin_ptr, hidden_size, head_dim,
    new_cu_seqlens_ptr, cu_seqlens_ptr, n_keep_ptr, n_visual_ptr, batch,
    BLOCK: tl.constexpr, DIMS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Copies the rows that move; a batch of -1: there are no bounds to write."""
    place = tl.program_id(0)
    row = tl.load(source_ptr + place)
    if row != place:
        _copy(hidden_ptr, row, new_hidden_ptr, place, hidden_size, BLOCK)
        _copy(cos_ptr, row, new_cos_ptr, place, head_dim, DIMS)
        _copy(sin_ptr, row, new_sin_ptr, place, head_dim, DIMS)
    if place == 0:
        for start in range(0, batch + 1, BATCH):
            at = start + tl.arange(0, BATCH)
            tl.store(cu_seqlens_ptr + at, tl.load(new_cu_seqlens_ptr + at, mask=at <= batch), mask=at <= batch)
            tl.store(n_visual_ptr + at, tl.load(n_keep_ptr + at, mask=at < batch), mask=at < batch)


@triton.jit
def _put_back(
    source_ptr, hidden_ptr, cos_ptr, sin_ptr, new_hidden_ptr, new_cos_ptr, new_sin_ptr, hidden_size, head_dim,
    BLOCK: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    if tl.load(source_ptr + place) != place:
        _copy(new_hidden_ptr, place, hidden_ptr, place, hidden_size, BLOCK)
        _copy(new_cos_ptr, place, cos_ptr, place, head_dim, DIMS)
        _copy(new_sin_ptr, place, sin_ptr, place, head_dim, DIMS)


def close_up(packed: Packed, is_kept: Tensor, n_keep: Tensor, most: int) -> Tensor:
    """See :func:`sparsevlm.kernels.close_up.close_up`."""
    (batch, most_visual), n_rows, device = is_kept.shape, packed.hidden.shape[0], is_kept.device
    is_kept, n_keep = is_kept.contiguous(), n_keep.contiguous()
    chosen = torch.empty((batch, most), dtype=torch.int64, device=device)
    source, place = torch.empty((2, n_rows), dtype=torch.int32, device=device)
    new_cu_seqlens = torch.empty(batch + 1, dtype=torch.int32, device=device)
    tokens = (packed.visual_rows, packed.alive, packed.image_idx)
    _close_up[(batch + 1,)](
        is_kept, n_keep, packed.cu_seqlens, packed.n_visual, *tokens, packed.n_text, packed.text_rows, chosen, source,
        place, new_cu_seqlens, batch, most_visual, most, packed.text_rows.shape[1], n_rows,
        *(tensor.stride(0) for tensor in tokens), packed.text_rows.stride(0), _BLOCK, num_warps=_WARPS,
    )  # fmt: skip
    bounds = (new_cu_seqlens, packed.cu_seqlens, n_keep, packed.n_visual, batch)
    _move(source, packed.hidden, packed.cos, packed.sin, bounds)
    return chosen


def gather_rows(rows: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See :func:`sparsevlm.kernels.close_up.gather_rows`."""
    _move(rows, hidden, cos, sin, (rows, rows, rows, rows, -1))


def _move(
    source: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor, bounds: tuple[Tensor, Tensor, Tensor, Tensor, int]
) -> None:
    n, sizes = source.shape[0], (hidden.shape[1], cos.shape[1])
    tensors = (hidden, cos, sin, *(tensor.new_empty((n, tensor.shape[1])) for tensor in (hidden, cos, sin)))
    blocks = [min(_MOST_COLUMNS, triton.next_power_of_2(size)) for size in sizes]
    if n:
        _set_aside[(n,)](source, *tensors, *sizes, *bounds, *blocks, _BLOCK, num_warps=_WARPS)
        _put_back[(n,)](source, *tensors, *sizes, *blocks, num_warps=_WARPS)
