"""One kernel for all picks: every program owns some rows, and all hear of each other's best before each pick.

A program's best is one number of 64 bits: the gain, in an order that whole numbers have, the row, and the step, so that
whoever reads it sees whether it is there yet. It lies in one of two places in turn, and so does what is left of each
row, which others read of the pick: nobody can be two steps ahead.
The factor of a program's own rows stays in its registers as far as it fits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exchange import LEAST_ROWS, MOST_PROGRAMS, hear_all, programs_at_once

_TILE, _WARPS = 8192, 8
# Picks for which a smaller tile is enough: there are only two sizes, since each is compiled.
_FEW = 64


@triton.jit
def _agree(gain, residual, free, rows, inside, n, tag, residual_ptr, slots_ptr, n_programs, others):
    """Publish the best of a program's rows, the lower one of equals, and wait for what all the others publish; a row
    takes 16 bits, and so does the step. Gives the best row of all, what is left of it, and the upper bits, which hold
    its gain."""
    turn = (tag % 2) * tl.num_programs(1) + tl.program_id(1)
    left_of = residual_ptr + turn * n
    tl.store(left_of + rows, residual, mask=inside)
    bits = tl.where(free, gain, float("-inf")).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    own = tl.max((ordered << 16) + (65535 - rows.to(tl.int64)), axis=0)
    known = others < n_programs
    heard = hear_all(own, tag, slots_ptr + turn * n_programs, tl.program_id(0), others, known, 16)
    best = tl.max(tl.where(known, heard, -(1 << 47)), axis=0)
    pick = 65535 - (best & 65535)
    return pick, tl.load(left_of + pick, volatile=True), best >> 16


@triton.jit
def _pick_all(
    gram_ptr, quality_ptr, factor_ptr, residual_ptr, order_ptr, slots_ptr, n, n_keep, n_programs, n_own,
    ROUNDS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gram, factor = gram_ptr + sample * n * n, factor_ptr + sample * n * n_keep
    rows = program * n_own + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < n_own) & (rows < n)
    long_rows = rows.to(tl.int64)
    length = tl.load(gram + long_rows * n + rows, mask=inside, other=0.0)
    quality = tl.load(quality_ptr + sample * n + rows, mask=inside, other=0.0)
    residual, free = length, inside
    others, columns = tl.arange(0, PROGRAMS), tl.arange(0, CHUNK)
    tile = tl.zeros([ROWS, CHUNK], tl.float32)
    step, start, tag = n_keep * 0, n_keep * 0, n_keep * 0
    while step < n_keep:
        gain = tl.where(residual <= NOISE * length, quality - 2.0, quality * quality * residual)
        tag += 1
        pick, left, best = _agree(
            gain, residual, free, rows, inside, n, tag, residual_ptr, slots_ptr, n_programs, others
        )  # fmt: skip
        if (best < 0) & ROUNDS:  # the picks so far span all that is left: go on as if none had been picked
            residual, start = length, step
            gain = tl.where(length <= 0.0, quality - 2.0, quality * quality * length)
            tag += 1
            pick, left, best = _agree(
                gain, residual, free, rows, inside, n, tag, residual_ptr, slots_ptr, n_programs, others
            )  # fmt: skip
        pick_length = tl.load(gram + pick * n + pick)
        column = tl.load(gram + pick * n + rows, mask=inside, other=0.0)
        near = (columns >= start) & (columns < step)
        of_pick = tl.load(factor + pick * n_keep + columns, mask=near, other=0.0, volatile=True)
        column -= tl.sum(tile * of_pick[None, :], axis=1)
        done = n_keep * 0 + CHUNK
        while done < step:
            earlier = done + columns
            near = (earlier >= start) & (earlier < step)
            of_pick = tl.load(factor + pick * n_keep + earlier, mask=near, other=0.0, volatile=True)
            mask = inside[:, None] & near[None, :]
            own = tl.load(factor + long_rows[:, None] * n_keep + earlier[None, :], mask=mask, other=0.0)
            column -= tl.sum(own * of_pick[None, :], axis=1)
            done += CHUNK
        spanned = left <= NOISE * pick_length
        column = tl.where(spanned, 0.0, column / tl.sqrt(tl.where(spanned, 1.0, left)))
        tl.store(factor + long_rows * n_keep + step, column, mask=inside)
        tile = tl.where((columns == step)[None, :], column[:, None], tile)
        residual -= column * column
        free = free & (rows != pick)
        if program == 0:
            tl.store(order_ptr + sample * n_keep + step, pick)
        step += 1


def pivoted_cholesky(gram: Tensor, quality: Tensor, n_keep: int, rounds: bool, noise: float) -> Tensor:
    """See :func:`sparsevlm.kernels.pivoted_cholesky.pivoted_cholesky`."""
    batch = quality.shape[0]
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=gram.device)
    gram, quality = gram.contiguous(), quality.float().contiguous()
    at_once = programs_at_once(gram)
    for first in range(0, batch, at_once):
        some = slice(first, min(batch, first + at_once))
        with torch.cuda.device_of(gram):  # hooks ask from whatever device is current
            _launch(gram[some], quality[some], order[some], at_once, rounds, noise)
    return order


def _launch(gram: Tensor, quality: Tensor, order: Tensor, at_once: int, rounds: bool, noise: float) -> None:
    (batch, n), n_keep, device = quality.shape, order.shape[1], gram.device
    n_programs = max(1, min(at_once // batch, triton.cdiv(n, LEAST_ROWS)))
    n_own = triton.cdiv(n, n_programs)  # a block holds more than that, of which nothing is read
    n_programs, n_rows = triton.cdiv(n, n_own), max(LEAST_ROWS, triton.next_power_of_2(n_own))
    factor, residual = torch.empty((batch, n, n_keep), device=device), torch.empty((2, batch, n), device=device)
    slots = torch.zeros((2, batch, n_programs), dtype=torch.int64, device=device)
    chunk = max(16, _TILE // n_rows)
    _pick_all[(n_programs, batch)](
        gram, quality, factor, residual, order, slots, n, n_keep, n_programs, n_own,
        rounds, noise, n_rows, chunk if n_keep > _FEW else min(chunk, _FEW), MOST_PROGRAMS, num_warps=_WARPS,
    )  # fmt: skip
