"""One kernel per pick: the column of the pick's Cholesky factor, what it leaves of every row, and who is next.

Nothing returns to the host. A kernel reads what the one before found, block by block of rows, in one of two buffers,
and writes into the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _CHUNK = 128, 32


@triton.jit
def _note_best(
    residual, length, quality, taken, columns, n, values_out, indices_out, at, NOISE: tl.constexpr
):  # fmt: skip
    """A block's best row, and its best if all began anew; both are noted with what is left of the former."""
    open_now = (columns < n) & (taken == 0)
    again = tl.where(length <= 0.0, quality - 2.0, quality * quality * length)
    gain = tl.where(residual <= NOISE * length, quality - 2.0, quality * quality * residual)
    gain = tl.where(open_now, gain, float("-inf"))
    again = tl.where(open_now, again, float("-inf"))
    best, place = tl.max(gain, axis=0, return_indices=True, return_indices_tie_break_left=True)
    best_again, place_again = tl.max(again, axis=0, return_indices=True, return_indices_tie_break_left=True)
    here = tl.arange(0, columns.shape[0])
    tl.store(values_out + at * 3, best)
    tl.store(values_out + at * 3 + 1, tl.sum(tl.where(here == place, residual, 0.0), axis=0))
    tl.store(values_out + at * 3 + 2, best_again)
    tl.store(indices_out + at * 2, tl.sum(tl.where(here == place, columns, 0), axis=0))
    tl.store(indices_out + at * 2 + 1, tl.sum(tl.where(here == place_again, columns, 0), axis=0))


@triton.jit
def _begin(
    length_ptr, quality_ptr, taken_ptr, residual_ptr, values_out, indices_out, n, n_blocks, NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    at = sample.to(tl.int64) * n + columns
    length = tl.load(length_ptr + at, mask=inside, other=0.0)
    quality = tl.load(quality_ptr + at, mask=inside, other=0.0)
    taken = tl.load(taken_ptr + at, mask=inside, other=1)
    tl.store(residual_ptr + at, length, mask=inside)
    _note_best(length, length, quality, taken, columns, n, values_out, indices_out, sample * n_blocks + block, NOISE)


@triton.jit(do_not_specialize=["step"])
def _pick(
    gram_ptr, length_ptr, quality_ptr, taken_ptr, residual_ptr, factor_ptr, order_ptr,
    values_in, indices_in, start_in, values_out, indices_out, start_out,
    step, n, n_keep, n_blocks,
    ROUNDS: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    others = tl.arange(0, BLOCKS)
    there = sample * n_blocks + others
    known = others < n_blocks
    gains = tl.load(values_in + there * 3, mask=known, other=float("-inf"))
    again = tl.load(values_in + there * 3 + 2, mask=known, other=float("-inf"))
    best, winner = tl.max(gains, axis=0, return_indices=True, return_indices_tie_break_left=True)
    _, winner_again = tl.max(again, axis=0, return_indices=True, return_indices_tie_break_left=True)
    anew = (best < 0.0) & ROUNDS  # the picks so far span all that is left
    pick = tl.load(indices_in + (sample * n_blocks + winner) * 2)
    left = tl.load(values_in + (sample * n_blocks + winner) * 3 + 1)
    pick_again = tl.load(indices_in + (sample * n_blocks + winner_again) * 2 + 1)
    pick = tl.where(anew, pick_again, pick)
    pick_length = tl.load(length_ptr + sample * n + pick)
    left = tl.where(anew, pick_length, left)
    start = tl.where(anew, step, tl.load(start_in + sample))

    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < n
    at = sample * n + columns
    column = tl.load(gram_ptr + (sample * n + pick) * n + columns, mask=inside, other=0.0)
    factor = factor_ptr + sample * n_keep * n
    done = start
    while done < step:
        earlier = done + tl.arange(0, CHUNK)
        of_pick = tl.load(factor + earlier.to(tl.int64) * n + pick, mask=earlier < step, other=0.0)
        mask = (earlier < step)[:, None] & inside[None, :]
        tile = tl.load(factor + earlier.to(tl.int64)[:, None] * n + columns[None, :], mask=mask, other=0.0)
        column -= tl.sum(tile * of_pick[:, None], axis=0)
        done += CHUNK
    spanned = left <= NOISE * pick_length
    column = tl.where(spanned, 0.0, column / tl.sqrt(tl.where(spanned, 1.0, left)))
    tl.store(factor + step.to(tl.int64) * n + columns, column, mask=inside)

    length = tl.load(length_ptr + at, mask=inside, other=0.0)
    quality = tl.load(quality_ptr + at, mask=inside, other=0.0)
    residual = tl.where(anew, length, tl.load(residual_ptr + at, mask=inside, other=0.0)) - column * column
    taken = tl.where(columns == pick, 1, tl.load(taken_ptr + at, mask=inside, other=1))
    tl.store(residual_ptr + at, residual, mask=inside)
    tl.store(taken_ptr + at, taken.to(tl.int8), mask=inside)
    _note_best(residual, length, quality, taken, columns, n, values_out, indices_out, sample * n_blocks + block, NOISE)
    if block == 0:
        tl.store(order_ptr + sample * n_keep + step, pick.to(tl.int64))
        tl.store(start_out + sample, start)


def pivots(gram: Tensor, quality: Tensor, n_keep: int, rounds: bool, noise: float) -> Tensor:
    """See :func:`sparsevlm.kernels.pivots.pivots`."""
    batch, n = quality.shape
    device = gram.device
    n_blocks = triton.cdiv(n, _BLOCK)
    length = gram.diagonal(dim1=-2, dim2=-1).contiguous()
    residual, factor = torch.empty_like(length), torch.empty((batch, n_keep, n), device=device)
    taken = torch.zeros((batch, n), dtype=torch.int8, device=device)
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=device)
    values = torch.empty((2, batch, n_blocks, 3), device=device)
    indices = torch.empty((2, batch, n_blocks, 2), dtype=torch.int32, device=device)
    start = torch.zeros((2, batch), dtype=torch.int32, device=device)
    gram, quality = gram.contiguous(), quality.float().contiguous()
    grid = (batch, n_blocks)
    _begin[grid](length, quality, taken, residual, values[0], indices[0], n, n_blocks, noise, _BLOCK)
    for step in range(n_keep):
        now, then = step % 2, 1 - step % 2
        _pick[grid](
            gram, length, quality, taken, residual, factor, order, values[now], indices[now], start[now], values[then],
            indices[then], start[then], step, n, n_keep, n_blocks, rounds, noise, _BLOCK, _CHUNK,
            triton.next_power_of_2(n_blocks),
        )  # fmt: skip
    return order
