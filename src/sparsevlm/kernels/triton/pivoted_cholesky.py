"""One kernel for all picks: every program owns some rows, and after each pick all wait for each other.

What a program finds best among its rows it writes down, in one of two places in turn; all read what all have found and
agree on the pick. The factor lies row by row, so that a program's own part stays close to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of one launch, if there are as many multiprocessors: waiting for each other takes that all run at once.
_MOST_PROGRAMS = 128
_LEAST_ROWS, _TILE, _WARPS = 16, 8192, 8


@triton.jit
def _note_best(residual, length, quality, taken, rows, n, values, indices, at, NOISE: tl.constexpr):
    """A program's best row, and its best if all began anew, with what is left of the former."""
    free = (rows < n) & (taken == 0)
    again = tl.where(length <= 0.0, quality - 2.0, quality * quality * length)
    gain = tl.where(residual <= NOISE * length, quality - 2.0, quality * quality * residual)
    gain = tl.where(free, gain, float("-inf"))
    again = tl.where(free, again, float("-inf"))
    best, place = tl.max(gain, axis=0, return_indices=True, return_indices_tie_break_left=True)
    best_again, place_again = tl.max(again, axis=0, return_indices=True, return_indices_tie_break_left=True)
    here = tl.arange(0, rows.shape[0])
    tl.store(values + at * 3, best)
    tl.store(values + at * 3 + 1, tl.sum(tl.where(here == place, residual, 0.0), axis=0))
    tl.store(values + at * 3 + 2, best_again)
    tl.store(indices + at * 2, tl.sum(tl.where(here == place, rows, 0), axis=0))
    tl.store(indices + at * 2 + 1, tl.sum(tl.where(here == place_again, rows, 0), axis=0))


@triton.jit
def _wait_for_all(counter, target):
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def _pick_all(
    gram_ptr, quality_ptr, factor_ptr, order_ptr, values, indices, counter_ptr, n, n_keep, n_programs,
    ROUNDS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gram, factor = gram_ptr + sample * n * n, factor_ptr + sample * n * n_keep
    counter = counter_ptr + sample
    rows = program * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    long_rows = rows.to(tl.int64)
    length = tl.load(gram + long_rows * n + rows, mask=inside, other=0.0)
    quality = tl.load(quality_ptr + sample * n + rows, mask=inside, other=0.0)
    residual = length
    taken = tl.zeros([ROWS], tl.int32)
    others = tl.arange(0, PROGRAMS)
    known = others < n_programs
    step, start = n_keep * 0, n_keep * 0
    while step < n_keep:
        place = ((step % 2) * tl.num_programs(1) + sample) * n_programs
        _note_best(residual, length, quality, taken, rows, n, values, indices, place + program, NOISE)
        _wait_for_all(counter, (step + 1) * n_programs)
        gains = tl.load(values + (place + others) * 3, mask=known, other=float("-inf"), volatile=True)
        again = tl.load(values + (place + others) * 3 + 2, mask=known, other=float("-inf"), volatile=True)
        best, winner = tl.max(gains, axis=0, return_indices=True, return_indices_tie_break_left=True)
        _, winner_again = tl.max(again, axis=0, return_indices=True, return_indices_tie_break_left=True)
        anew = (best < 0.0) & ROUNDS  # the picks so far span all that is left
        pick = tl.load(indices + (place + winner) * 2, volatile=True)
        left = tl.load(values + (place + winner) * 3 + 1, volatile=True)
        pick_again = tl.load(indices + (place + winner_again) * 2 + 1, volatile=True)
        pick = tl.where(anew, pick_again, pick).to(tl.int64)
        pick_length = tl.load(gram + pick * n + pick)
        left = tl.where(anew, pick_length, left)
        start = tl.where(anew, step, start)

        column = tl.load(gram + pick * n + rows, mask=inside, other=0.0)
        done = start
        while done < step:
            earlier = done + tl.arange(0, CHUNK)
            near = earlier < step
            of_pick = tl.load(factor + pick * n_keep + earlier, mask=near, other=0.0, volatile=True)
            mask = inside[:, None] & near[None, :]
            tile = tl.load(factor + long_rows[:, None] * n_keep + earlier[None, :], mask=mask, other=0.0)
            column -= tl.sum(tile * of_pick[None, :], axis=1)
            done += CHUNK
        spanned = left <= NOISE * pick_length
        column = tl.where(spanned, 0.0, column / tl.sqrt(tl.where(spanned, 1.0, left)))
        tl.store(factor + long_rows * n_keep + step, column, mask=inside)
        residual = tl.where(anew, length, residual) - column * column
        taken = tl.where(rows == pick, 1, taken)
        if program == 0:
            tl.store(order_ptr + sample * n_keep + step, pick)
        step += 1


def pivoted_cholesky(gram: Tensor, quality: Tensor, n_keep: int, rounds: bool, noise: float) -> Tensor:
    """See :func:`sparsevlm.kernels.pivoted_cholesky.pivoted_cholesky`."""
    batch = quality.shape[0]
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=gram.device)
    gram, quality = gram.contiguous(), quality.float().contiguous()
    at_once = 1  # Triton's interpreter runs one after the other
    if gram.is_cuda:
        at_once = min(_MOST_PROGRAMS, torch.cuda.get_device_properties(gram.device).multi_processor_count)
    for first in range(0, batch, at_once):
        some = slice(first, min(batch, first + at_once))
        _launch(gram[some], quality[some], order[some], at_once, rounds, noise)
    return order


def _launch(gram: Tensor, quality: Tensor, order: Tensor, at_once: int, rounds: bool, noise: float) -> None:
    (batch, n), n_keep, device = quality.shape, order.shape[1], gram.device
    n_programs = max(1, min(at_once // batch, triton.cdiv(n, _LEAST_ROWS)))
    n_rows = max(16, triton.next_power_of_2(triton.cdiv(n, n_programs)))
    n_programs = triton.cdiv(n, n_rows)
    factor = torch.empty((batch, n, n_keep), device=device)
    values = torch.empty((2, batch, n_programs, 3), device=device)
    indices = torch.empty((2, batch, n_programs, 2), dtype=torch.int32, device=device)
    counter = torch.zeros(batch, dtype=torch.int32, device=device)
    chunk = max(16, min(triton.next_power_of_2(n_keep), _TILE // n_rows))
    _pick_all[(n_programs, batch)](
        gram, quality, factor, order, values, indices, counter, n, n_keep, n_programs,
        rounds, noise, n_rows, chunk, triton.next_power_of_2(n_programs), num_warps=_WARPS,
    )  # fmt: skip
