"""One kernel for all picks: every program owns some rows, and all hear of each other's best before each pick.

Picks come in blocks. Within one a program holds the factor of its own rows in registers; between two, products of the
factor are taken from those of the rows (as LAPACK's pstrf does), so that a pick costs the same however many there were.

A program's best is one number of 64 bits: the gain, in an order that whole numbers have, the row, and the step, so that
whoever reads it sees whether it is there yet. It lies in one of two places in turn, and so does what is left of each
row, which others read of the pick: nobody can be two steps ahead.
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
# So many rows are picked by one program, which hears of nobody.
_MOST_ALONE = 256
# More rows are picked in one block, as products of all pairs are then not held twice, unless so many picks would each
# read all that came before.
_MOST_BLOCKED, _MOST_IN_A_BLOCK = 8192, 4096
_COPIED = 1024


@triton.jit
def _agree(
    gain, residual, free, rows, inside, n, tag, residual_ptr, slots_ptr, n_programs, others, ALONE: tl.constexpr
):  # fmt: skip
    """Publish the best of a program's rows, the lower one of equals, and wait for what all the others publish; a row
    takes 16 bits, and so does the step. Gives the best row of all, what is left of it, and the upper bits, which hold
    its gain. A program that owns all rows hears of nobody."""
    bits = tl.where(free, gain, float("-inf")).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    best = tl.max((ordered << 16) + (65535 - rows.to(tl.int64)), axis=0)
    if ALONE:
        tl.debug_barrier()  # what was written of the last pick is read of this one
        pick = 65535 - (best & 65535)
        left = tl.sum(tl.where(rows == pick, residual, 0.0), axis=0)
    else:
        turn = (tag % 2) * tl.num_programs(1) + tl.program_id(1)
        left_of = residual_ptr + turn * n
        tl.store(left_of + rows, residual, mask=inside)
        known = others < n_programs
        heard = hear_all(best, tag, slots_ptr + turn * n_programs, tl.program_id(0), others, known, 16)
        best = tl.max(tl.where(known, heard, -(1 << 47)), axis=0)
        pick = 65535 - (best & 65535)
        left = tl.load(left_of + pick, volatile=True)
    return pick, left, best >> 16


@triton.jit
def _column_of(
    pick, base, factor, rows, inside, tile, start, step, width, ROWS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Products of a program's rows with the pick, without those of what picks ``start`` to ``step - 1`` of the block
    have taken."""
    columns, long_rows = tl.arange(0, CHUNK), rows.to(tl.int64)
    column = tl.load(base + rows, mask=inside, other=0.0)
    near = (columns >= start) & (columns < step)
    of_pick = tl.load(factor + pick * width + columns, mask=near, other=0.0, volatile=True)
    column -= tl.sum(tile * of_pick[None, :], axis=1)
    done = step * 0 + CHUNK
    while done < step:
        earlier = done + columns
        near = (earlier >= start) & (earlier < step)
        of_pick = tl.load(factor + pick * width + earlier, mask=near, other=0.0, volatile=True)
        mask = inside[:, None] & near[None, :]
        own = tl.load(factor + long_rows[:, None] * width + earlier[None, :], mask=mask, other=0.0)
        column -= tl.sum(own * of_pick[None, :], axis=1)
        done += CHUNK
    return column


# How rows are shared out alters no address that is read in one go, so it is compiled once for all.
@triton.jit(do_not_specialize=["first", "stop", "n_keep", "n_programs", "n_own"])
def _pick_block(
    gram_ptr, work_ptr, quality_ptr, factor_ptr, residual_ptr, left_ptr, state_ptr, order_ptr, slots_ptr, counts_ptr,
    enough_ptr, least_ptr, first, stop, n, n_keep, width, n_programs, n_own,
    ROUNDS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PROGRAMS: tl.constexpr,
    COUNTED: tl.constexpr, ENDS: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Picks ``first`` to ``stop - 1``; ``work_ptr`` are the products without what earlier blocks have picked.

    With ``ENDS`` a sample's picks end, and their number is written down, where no row has more left than ``enough_ptr``
    says, but with ``least_ptr`` picks at least."""
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gram, work, factor = gram_ptr + sample * n * n, work_ptr + sample * n * n, factor_ptr + sample * n * width
    rows = program * n_own + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < n_own) & (rows < n)
    long_rows = rows.to(tl.int64)
    length = tl.load(gram + long_rows * n + rows, mask=inside, other=0.0)
    quality = tl.load(quality_ptr + sample * n + rows, mask=inside, other=0.0)
    tag = tl.load(state_ptr + sample * 2)
    step, start, anew, base, total = tag * 0 + first, tag * 0, tag * 0, work, tag * 0 + n_keep
    if COUNTED:
        total = tl.load(counts_ptr + sample).to(tl.int32)
    stop = tl.minimum(stop, total)
    goes_on = tl.full([ROWS], 0, tl.int32) + step > 0
    before = tl.load(left_ptr + sample * n + rows, mask=inside & goes_on, other=0.0)
    free = inside & (before >= 0.0)
    residual = tl.where(goes_on, before, length)
    others, columns, tile = tl.arange(0, PROGRAMS), tl.arange(0, CHUNK), tl.zeros([ROWS, CHUNK], tl.float32)
    while step < stop:
        gain = tl.where(residual <= NOISE * length, quality - 2.0, quality * quality * residual)
        tag += 1
        pick, left, best = _agree(
            gain, residual, free, rows, inside, n, tag, residual_ptr, slots_ptr, n_programs, others, ALONE
        )  # fmt: skip
        if ENDS and ((best < 0) | (left <= tl.load(enough_ptr + sample))):
            total = tl.minimum(total, tl.maximum(step, tl.load(least_ptr + sample).to(tl.int32)))
            stop = tl.minimum(stop, total)
        if step < stop:
            if (best < 0) & ROUNDS:  # the picks so far span all that is left: go on as if none had been picked
                residual, start, anew, base = length, step - first, tag * 0 + 1, gram
                gain = tl.where(length <= 0.0, quality - 2.0, quality * quality * length)
                tag += 1
                pick, left, best = _agree(
                    gain, residual, free, rows, inside, n, tag, residual_ptr, slots_ptr, n_programs, others, ALONE
                )  # fmt: skip
            pick_length = tl.load(gram + pick * n + pick)
            column = _column_of(
                pick, base + pick * n, factor, rows, inside, tile, start, step - first, width, ROWS, CHUNK
            )
            spanned = left <= NOISE * pick_length
            column = tl.where(spanned, 0.0, column / tl.sqrt(tl.where(spanned, 1.0, left)))
            tl.store(factor + long_rows * width + step - first, column, mask=inside)
            tile = tl.where((columns == step - first)[None, :], column[:, None], tile)
            residual -= column * column
            free = free & (rows != pick)
            if program == 0:
                tl.store(order_ptr + sample * n_keep + step, pick)
            step += 1
    if ENDS and program == 0:
        tl.store(counts_ptr + sample, total.to(tl.int64))
    tl.store(left_ptr + sample * n + rows, tl.where(free, tl.maximum(residual, 0.0), -1.0), mask=inside)
    # What was picked before all began anew counts no more.
    stale = inside[:, None] & (columns < start)[None, :]
    tl.store(factor + long_rows[:, None] * width + columns[None, :], tl.zeros([ROWS, CHUNK], tl.float32), mask=stale)
    if program == 0:
        tl.store(state_ptr + sample * 2, tag)
        tl.store(state_ptr + sample * 2 + 1, anew)


@triton.jit
def _begin_anew(gram_ptr, work_ptr, state_ptr, n_elements, BLOCK: tl.constexpr):
    """Put the products of the rows back where all began anew."""
    sample = tl.program_id(1).to(tl.int64)
    if tl.load(state_ptr + sample * 2 + 1) == 0:
        return
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(gram_ptr + sample * n_elements + at, mask=at < n_elements)
    tl.store(work_ptr + sample * n_elements + at, values, mask=at < n_elements)


def pivoted_cholesky(
    gram: Tensor, quality: Tensor, n_keep: int, rounds: bool, noise: float, counts: Tensor | None = None
) -> Tensor:
    """See :func:`sparsevlm.kernels.pivoted_cholesky.pivoted_cholesky`."""
    return _picks(gram, quality.float(), n_keep, counts, None, rounds, noise)


def spanning_picks(
    gram: Tensor, enough: Tensor, least: Tensor, most: Tensor, n_picks: int, noise: float
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.pivoted_cholesky.spanning_picks`."""
    counts, ends = most.clone(), (enough.contiguous(), least.contiguous())
    return _picks(gram, gram.new_ones(gram.shape[:2]), n_picks, counts, ends, True, noise), counts


def _picks(
    gram: Tensor,
    quality: Tensor,
    n_keep: int,
    counts: Tensor | None,
    ends: tuple[Tensor, Tensor] | None,
    rounds: bool,
    noise: float,
) -> Tensor:
    batch = quality.shape[0]
    order = torch.zeros((batch, n_keep), dtype=torch.int64, device=gram.device)
    gram, quality = gram.contiguous(), quality.contiguous()
    counts = None if counts is None else counts.contiguous()
    at_once = programs_at_once(gram)
    for first in range(0, batch, at_once):
        some = slice(first, min(batch, first + at_once))
        with torch.cuda.device_of(gram):  # hooks ask from whatever device is current
            stops = None if counts is None else counts[some]
            own_ends = None if ends is None else (ends[0][some], ends[1][some])
            _launch(gram[some], quality[some], order[some], stops, own_ends, at_once, rounds, noise)
    return order


def _launch(
    gram: Tensor,
    quality: Tensor,
    order: Tensor,
    counts: Tensor | None,
    ends: tuple[Tensor, Tensor] | None,
    at_once: int,
    rounds: bool,
    noise: float,
) -> None:
    (batch, n), n_keep, device = quality.shape, order.shape[1], gram.device
    n_programs = 1 if n <= _MOST_ALONE else max(1, min(at_once // batch, triton.cdiv(n, LEAST_ROWS)))
    n_own = triton.cdiv(n, n_programs)  # a block holds more than that, of which nothing is read
    n_programs, n_rows = triton.cdiv(n, n_own), max(LEAST_ROWS, triton.next_power_of_2(n_own))
    chunk = max(16, _TILE // n_rows)
    chunk = min(chunk, _FEW) if n_keep <= _FEW else chunk
    width = min(n_keep, chunk) if n <= _MOST_BLOCKED or n_keep > _MOST_IN_A_BLOCK else n_keep
    factor, left = torch.empty((batch, n, width), device=device), torch.empty((batch, n), device=device)
    residual = torch.empty((2, batch, n), device=device)
    slots = torch.zeros((2, batch, n_programs), dtype=torch.int64, device=device)
    state = torch.zeros((batch, 2), dtype=torch.int32, device=device)
    work = gram if width == n_keep else torch.empty_like(gram)
    for first in range(0, n_keep, width):
        if first:
            if first > width and rounds:
                grid = (triton.cdiv(n * n, _COPIED), batch)
                _begin_anew[grid](gram, work, state, n * n, _COPIED, num_warps=4)
            torch.baddbmm(gram if first == width else work, factor, factor.mT, alpha=-1.0, out=work)
        _pick_block[(n_programs, batch)](
            gram, work if first else gram, quality, factor, residual, left, state, order, slots,
            slots if counts is None else counts, *(ends or (quality, slots)),
            first, min(first + width, n_keep), n, n_keep, width, n_programs, n_own,
            rounds, noise, n_rows, chunk, MOST_PROGRAMS, counts is not None, ends is not None, n <= _MOST_ALONE,
            num_warps=_WARPS,
            launch_cooperative_grid=True,
        )  # fmt: skip
