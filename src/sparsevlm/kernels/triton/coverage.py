"""One kernel for all picks: every program owns some candidates, and all hear of each other's best before each pick.

A program's best is one number of 64 bits: what its score begins with, to nine digits, and the row; programs know the
pick by it. Each then lists for itself the rows that the pick covers better than all before, and takes from its gains
what the pick has covered of these rows; others change no gain. To share the lists would take one more exchange.

Values lie candidate by candidate: those of a pick are read by all programs, and then lie side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exchange import hear_all, programs_at_once, share_rows

_LAST_ROW = (1 << 20) - 1
_TAG_BITS, _TAGS = 2, 3
_TILE, _CHUNK, _WARPS = 4096, 4096, 8


@triton.jit
def _list_better(reached_ptr, current_ptr, listed_ptr, low_ptr, high_ptr, n_covered, CHUNK: tl.constexpr):
    """Lists rows that a pick covers better, with how well they were and now are covered; their number."""
    count = 0
    for start in range(0, n_covered, CHUNK):
        covered = start + tl.arange(0, CHUNK)
        inside = covered < n_covered
        reached = tl.load(reached_ptr + covered, mask=inside, other=0.0)
        current = tl.load(current_ptr + covered, mask=inside, other=0.0)
        better = inside & (reached > current)
        tl.debug_barrier()  # few rows are read by several warps each, all of them before the first writes
        place = count + tl.cumsum(better.to(tl.int32), axis=0) - 1
        tl.store(listed_ptr + place, covered, mask=better)
        tl.store(low_ptr + place, current, mask=better)
        tl.store(high_ptr + place, reached, mask=better)
        tl.store(current_ptr + covered, reached, mask=better)
        count += tl.sum(better.to(tl.int32), axis=0)
    return count


@triton.jit
def _sum_between(
    values_ptr, rows, n, n_covered, listed_ptr, low_ptr, high_ptr, count, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """``Σ_u max(0, min(v_ui, high_u) − low_u)`` over the listed rows u, for a program's candidates i."""
    total = tl.zeros([ROWS, TILE], tl.float64)
    of_row = values_ptr + rows.to(tl.int64)[:, None] * n_covered
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        known = place < count
        covered = tl.load(listed_ptr + place, mask=known, other=0)
        low = tl.load(low_ptr + place, mask=known, other=0.0)
        high = tl.load(high_ptr + place, mask=known, other=0.0)
        value = tl.load(of_row + covered[None, :], mask=(rows < n)[:, None] & known[None, :], other=0.0)
        part = tl.minimum(value, high[None, :]).to(tl.float64) - low.to(tl.float64)[None, :]
        total += tl.where(part > 0.0, part, 0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _exchange(message, turn, slots_ptr, others, n_programs, TAG_BITS: tl.constexpr, TAGS: tl.constexpr):
    """The largest of what the programs of a sample publish; not negative, of 61 bits."""
    slots = slots_ptr + ((turn % 2) * tl.num_programs(1) + tl.program_id(1)) * n_programs
    known = others < n_programs
    heard = hear_all(message, 1 + turn // 2 % TAGS, slots, tl.program_id(0), others, known, TAG_BITS)
    return tl.max(tl.where(known, heard, 0), axis=0)


@triton.jit
def _pick_all(
    values_ptr, factor_ptr, valid_ptr, order_ptr, listed_ptr, levels_ptr, slots_ptr, n_covered, n, n_keep, n_programs,
    NOISE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, PROGRAMS: tl.constexpr,
    LAST_ROW: tl.constexpr, TAG_BITS: tl.constexpr, TAGS: tl.constexpr,
):  # fmt: skip
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    values = values_ptr + sample * n * n_covered
    own = (sample * n_programs + program) * n_covered
    listed, current = listed_ptr + own, levels_ptr + own * 3
    low, high = current + n_covered, current + 2 * n_covered
    rows, others = program * ROWS + tl.arange(0, ROWS), tl.arange(0, PROGRAMS)
    inside = rows < n
    factor = tl.load(factor_ptr + sample * n + rows, mask=inside, other=0.0).to(tl.float64)
    valid = tl.load(valid_ptr + sample * n + rows, mask=inside, other=0) != 0

    for start in range(0, n_covered, CHUNK):  # before the first pick nothing is covered, and all is to be
        covered = start + tl.arange(0, CHUNK)
        tl.store(listed + covered, covered, mask=covered < n_covered)
        tl.store(current + covered, 0.0, mask=covered < n_covered)
        tl.store(low + covered, 0.0, mask=covered < n_covered)
        tl.store(high + covered, float("inf"), mask=covered < n_covered)
    tl.debug_barrier()
    gain = _sum_between(values, rows, n, n_covered, listed, low, high, n_covered, ROWS, TILE)
    most = tl.max(tl.where(valid, gain, 0.0), axis=0).to(tl.int64, bitcast=True) >> TAG_BITS
    most = _exchange(most, 0, slots_ptr, others, n_programs, TAG_BITS, TAGS)
    least = NOISE * (most << TAG_BITS).to(tl.float64, bitcast=True)

    # Below any score: candidates that fill up, then picked ones, then what is no candidate.
    below = tl.where(valid, 3, tl.where(inside, 2, 0))
    for step in range(n_keep):
        score = tl.where(gain > least, gain, 0.0) * factor
        digits = tl.where(score > 0.0, score, 0.0).to(tl.int64, bitcast=True) >> (20 + TAG_BITS)
        rank = tl.where(below == 3, 3 + digits, below)
        best = tl.max((rank * (LAST_ROW + 1)) + (LAST_ROW - rows), axis=0)
        best = _exchange(best, step + 1, slots_ptr, others, n_programs, TAG_BITS, TAGS)
        pick = LAST_ROW - (best & LAST_ROW)
        if program == 0:
            tl.store(order_ptr + sample * n_keep + step, pick)
        count = _list_better(values + pick * n_covered, current, listed, low, high, n_covered, CHUNK)
        tl.debug_barrier()
        gain -= _sum_between(values, rows, n, n_covered, listed, low, high, count, ROWS, TILE)
        below = tl.where(rows == pick, 1, below)


def coverage(values: Tensor, factor: Tensor, valid: Tensor, n_keep: int, noise: float) -> Tensor:
    """See :func:`sparsevlm.kernels.coverage.coverage`."""
    batch = valid.shape[0]
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=values.device)
    values, factor, valid = values.mT.contiguous(), factor.contiguous(), valid.contiguous()
    at_once = programs_at_once(values)
    for first in range(0, batch, at_once):
        some = slice(first, min(batch, first + at_once))
        with torch.cuda.device_of(values):  # hooks ask from whatever device is current
            _launch(values[some], factor[some], valid[some], order[some], at_once, noise)
    return order


def _launch(values: Tensor, factor: Tensor, valid: Tensor, order: Tensor, at_once: int, noise: float) -> None:
    (batch, n, n_covered), n_keep, device = values.shape, order.shape[1], values.device
    n_programs, n_rows = share_rows(n, batch, at_once)
    listed = torch.empty((batch, n_programs, n_covered), dtype=torch.int32, device=device)
    levels = torch.empty((batch, n_programs, 3, n_covered), device=device)
    slots = torch.zeros((2, batch, n_programs), dtype=torch.int64, device=device)
    chunk = max(16, min(_CHUNK, triton.next_power_of_2(n_covered)))
    _pick_all[(n_programs, batch)](
        values, factor, valid, order, listed, levels, slots, n_covered, n, n_keep, n_programs,
        noise, n_rows, max(16, min(chunk, _TILE // n_rows)), chunk, triton.next_power_of_2(n_programs),
        _LAST_ROW, _TAG_BITS, _TAGS, num_warps=_WARPS, launch_cooperative_grid=True,
    )  # fmt: skip
