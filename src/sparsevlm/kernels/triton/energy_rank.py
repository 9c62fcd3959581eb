"""One program per matrix: Householder's tridiagonal form, then all eigenvalues by bisection.

A matrix of up to 128 rows is held in registers. A larger one lies in global memory, and each reflection passes over the
rest of it once: what the reflection before changes is taken off on the way, as LAPACK's latrd puts it off.

Bisection is Sturm's: the signs of the pivots of T − x tell how many eigenvalues lie below x. Every eigenvalue has its
own interval and several points in it, and all points are counted at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..energy_rank import LARGEST, gram_matrices

# Points within each interval, and how often they are set: intervals shrink to (_POINTS + 1) ** -_ROUNDS < 1e-8.
_POINTS, _ROUNDS = 8, 9
# Rows that programs hold, and their warps.
_IN_REGISTERS = 128
_SIZES = ((16, 4), (32, 4), (64, 4), (_IN_REGISTERS, 8))
# Rows of matrices in global memory, points and rounds: more points than threads take longer, and more eigenvalues that
# are equal, all of them missed to the same side, ask for smaller intervals.
_LARGE_SIZES = ((256, 4, 13), (512, 2, 19), (LARGEST, 1, 30))
_LARGE_WARPS = 16
# Part of such a matrix that is read at once: each warp reads rows of 512 bytes. It has at least as many values as there
# are threads: two that held the same value would read it before and after it is written.
_TILE_ROWS, _TILE_COLUMNS = 64, 128
# Rows of a matrix in global memory begin at multiples of so many values, a line of the cache.
_LINE = tl.constexpr(32)
# Sums of equal terms must not miss a threshold that they meet exactly: relative, in float32.
_ROUNDING = 2e-6


@triton.jit(do_not_specialize=["n"])
def _order_rows(gram_ptr, order_ptr, counts_ptr, rank_ptr, n, SIZE: tl.constexpr):
    """Rows that are not zero, and how many these are; the rank is 0 where there are none."""
    sample = tl.program_id(0)
    rows = tl.arange(0, SIZE)
    energy = tl.load(gram_ptr + (sample.to(tl.int64) * n + rows) * n + rows, mask=rows < n, other=0.0)
    counts = ((energy == 0.0) == 0).to(tl.int32)
    place = tl.cumsum(counts, axis=0) - 1
    tl.store(order_ptr + sample * n + place, rows, mask=counts != 0)
    tl.store(counts_ptr + sample, tl.sum(counts, axis=0))
    tl.store(rank_ptr + sample, tl.zeros([], tl.int64))


@triton.jit
def _tridiagonal(
    gram_ptr, order_ptr, diagonal_ptr, beside_ptr, sample, n, stride, SIZE: tl.constexpr, LARGEST: tl.constexpr
):
    """Diagonal and squares of what stands beside it, of the Gram matrix by its trace, which is given: the energy."""
    rows, columns = tl.arange(0, SIZE), tl.arange(0, SIZE)
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    from_rows = tl.load(order_ptr + sample * stride + rows, mask=rows < n, other=0)
    from_columns = tl.load(order_ptr + sample * stride + columns, mask=columns < n, other=0)
    at = sample.to(tl.int64) * stride * stride + from_rows[:, None] * stride + from_columns[None, :]
    gram = tl.load(gram_ptr + at, mask=inside, other=0.0)
    on_diagonal = rows[:, None] == columns[None, :]
    energy = tl.sum(tl.sum(tl.where(on_diagonal, gram, 0.0), axis=1), axis=0)
    usable = (energy > 0.0) & (energy < float("inf"))
    a = tl.where(usable, gram / tl.where(usable, energy, 1.0), 0.0).to(tl.float32)
    k = 0
    while k < n - 2:
        column = tl.sum(tl.where(columns[None, :] == k, a, 0.0), axis=1)
        head = tl.sum(tl.where(rows == k + 1, column, 0.0), axis=0)
        tail = tl.where(rows > k + 1, column, 0.0)
        length = tl.sum(tail * tail, axis=0)
        norm = tl.sqrt(head * head + length)
        size = tl.abs(head)
        # A reflection that takes the column to its first entry; none where it is there already.
        factor = tl.where(length > 1e-30, 1.0 / tl.where(length > 1e-30, norm * (norm + size), 1.0), 0.0)
        v = tl.where(rows == k + 1, tl.where(head < 0.0, head - norm, head + norm), tail)
        p = factor * tl.sum(a * v[None, :], axis=1)
        w = p - 0.5 * factor * tl.sum(p * v, axis=0) * v
        a -= v[:, None] * w[None, :] + w[:, None] * v[None, :]
        k += 1
    below = tl.sum(tl.where(rows[:, None] == columns[None, :] + 1, a, 0.0), axis=1)
    tl.store(diagonal_ptr + sample * LARGEST + rows, tl.sum(tl.where(on_diagonal, a, 0.0), axis=1))
    tl.store(beside_ptr + sample * LARGEST + rows, below * below)
    return energy


@triton.jit
def _store_rank(
    diagonal_ptr, beside_ptr, rank_ptr, sample, energy, wanted, n,
    SIZE: tl.constexpr, POINTS: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Rank from the tridiagonal form, which the program has written: eigenvalues by bisection, as shares of the energy,
    and how many leading ones hold the share that is wanted."""
    tl.debug_barrier()  # every thread reads what others wrote of the form
    place, point = tl.arange(0, SIZE), tl.arange(0, POINTS)
    low, high = tl.zeros([SIZE], tl.float32), tl.full([SIZE], 1.0001, tl.float32)
    for _ in range(ROUNDS):
        x = low[:, None] + (high - low)[:, None] * ((point + 1).to(tl.float32) / (POINTS + 1))[None, :]
        n_below = tl.zeros([SIZE, POINTS], tl.int32)
        pivot = tl.full([SIZE, POINTS], 1.0, tl.float32)
        i = 0
        while i < n:
            at = sample * LARGEST + i
            pivot = tl.load(diagonal_ptr + at) - x - tl.load(beside_ptr + at) / pivot
            pivot = tl.where(tl.abs(pivot) < 1e-30, -1e-30, pivot)
            n_below += (pivot < 0.0).to(tl.int32)
            i += 1
        # The eigenvalue of this place, the largest at 0, is not below x.
        reaches = n - n_below > place[:, None]
        low = tl.maximum(low, tl.max(tl.where(reaches, x, 0.0), axis=1))
        high = tl.minimum(high, tl.min(tl.where(reaches, 2.0, x), axis=1))
    shares = tl.where(place < n, 0.5 * (low + high), 0.0)
    short_of = (tl.cumsum(shares, axis=0) < wanted) & (place < n)
    rank = tl.minimum(tl.sum(short_of.to(tl.int32), axis=0) + 1, n)
    rank = tl.where(energy > 0.0, rank, 0)
    tl.store(rank_ptr + sample, tl.where(energy < float("inf"), rank, -1).to(tl.int64))


@triton.jit(do_not_specialize=["stride"])
def _rank(
    gram_ptr, order_ptr, counts_ptr, diagonal_ptr, beside_ptr, rank_ptr, wanted, stride,
    LEAST: tl.constexpr, SIZE: tl.constexpr, POINTS: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    n = tl.load(counts_ptr + sample)
    if (n < LEAST) | (n > SIZE):  # of another size
        return
    energy = _tridiagonal(gram_ptr, order_ptr, diagonal_ptr, beside_ptr, sample, n, stride, SIZE, LARGEST)
    _store_rank(diagonal_ptr, beside_ptr, rank_ptr, sample, energy, wanted, n, SIZE, POINTS, ROUNDS, LARGEST)


@triton.jit
def _copy_shares(gram, order, a_ptr, n, stride, width, SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write a Gram matrix without its rows of zeros and by its trace, which is given."""
    place = tl.arange(0, SIZE)
    taken = tl.load(order + place, mask=place < n, other=0).to(tl.int64)
    energy = tl.sum(tl.load(gram + taken * stride + taken, mask=place < n, other=0.0), axis=0)
    usable = (energy > 0.0) & (energy < float("inf"))
    chunk = 0
    while chunk * COLUMNS < n:
        columns = chunk * COLUMNS + tl.arange(0, COLUMNS)
        from_columns = tl.load(order + columns, mask=columns < n, other=0)
        tile = 0
        while tile * ROWS < n:
            rows = tile * ROWS + tl.arange(0, ROWS)
            from_rows = tl.load(order + rows, mask=rows < n, other=0)
            inside = (rows < n)[:, None] & (columns < n)[None, :]
            values = tl.load(gram + from_rows[:, None] * stride + from_columns[None, :], mask=inside, other=0.0)
            a = tl.where(usable, values / tl.where(usable, energy, 1.0), 0.0).to(tl.float32)
            # Lines are filled up with zeros: they are computed with, if for nothing.
            mask = (rows < n)[:, None] & (columns < (n + _LINE - 1) // _LINE * _LINE)[None, :]
            tl.store(a_ptr + rows[:, None] * width + columns[None, :], a, mask=mask)
            tile += 1
        chunk += 1
    return energy


@triton.jit
def _reflect_and_multiply(
    a_ptr, before_ptr, w_ptr, v_ptr, p_ptr, m, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Take v wᵀ + w vᵀ of the reflection before off the leading m rows and columns, and write p, their product with the
    next v. Whole lines are taken, for loads of 16 bytes: nobody reads columns from m on again, nor p of these."""
    chunk = 0
    while chunk * COLUMNS < m:
        columns = chunk * COLUMNS + tl.arange(0, COLUMNS)
        near = columns < (m + _LINE - 1) // _LINE * _LINE
        v_columns = tl.load(before_ptr + columns, mask=near, other=0.0)
        w_columns = tl.load(w_ptr + columns, mask=near, other=0.0)
        product = tl.zeros([ROWS, COLUMNS], tl.float32)
        tile = 0
        while tile * ROWS < m:
            rows = tile * ROWS + tl.arange(0, ROWS)
            v_rows = tl.load(before_ptr + rows, mask=rows < m, other=0.0)
            w_rows = tl.load(w_ptr + rows, mask=rows < m, other=0.0)
            next_rows = tl.load(v_ptr + rows, mask=rows < m, other=0.0)
            at = a_ptr + rows[:, None] * width + columns[None, :]
            mask = (rows < m)[:, None] & near[None, :]
            a = tl.load(at, mask=mask, other=0.0)
            a -= v_rows[:, None] * w_columns[None, :] + w_rows[:, None] * v_columns[None, :]
            tl.store(at, a, mask=mask)
            product += a * next_rows[:, None]
            tile += 1
        # The matrix is symmetric: sums of columns are those of rows, and threads keep theirs to the end.
        tl.store(p_ptr + columns, tl.sum(product, axis=0), mask=near)
        chunk += 1


@triton.jit
def _tridiagonal_in_memory(
    a_ptr, v_ptr, w_ptr, p_ptr, diagonal, beside, n, width,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """:func:`_tridiagonal` of a matrix in global memory, from its last row to its first.

    ``v_ptr`` has room for two vectors, that of this step and that of the step before. Threads read what others wrote:
    v and w are zero from the step's row on, up to the end of a line.
    """
    place = tl.arange(0, SIZE)
    inside = place < (n + _LINE - 1) // _LINE * _LINE
    tl.store(v_ptr + n % 2 * width + place, tl.zeros([SIZE], tl.float32), mask=inside)
    tl.store(w_ptr + place, tl.zeros([SIZE], tl.float32), mask=inside)
    tl.debug_barrier()  # the matrix, v and w are there
    m = n - 1
    while m > 0:
        row, before_ptr, next_ptr = a_ptr + m * width, v_ptr + (m + 1) % 2 * width, v_ptr + m % 2 * width
        v_here, w_here, here = tl.load(before_ptr + m), tl.load(w_ptr + m), tl.load(row + m)
        head = tl.load(row + m - 1) - tl.load(before_ptr + m - 1) * w_here - tl.load(w_ptr + m - 1) * v_here
        mask = place < m - 1
        tail = tl.load(row + place, mask=mask, other=0.0)
        tail -= tl.load(before_ptr + place, mask=mask, other=0.0) * w_here
        tail -= tl.load(w_ptr + place, mask=mask, other=0.0) * v_here
        length = tl.sum(tail * tail, axis=0)
        tl.store(diagonal + m, here - 2.0 * v_here * w_here)
        tl.store(beside + m, head * head + length)
        norm = tl.sqrt(head * head + length)
        size = tl.abs(head)
        factor = tl.where(length > 1e-30, 1.0 / tl.where(length > 1e-30, norm * (norm + size), 1.0), 0.0)
        v = tl.where(place == m - 1, tl.where(head < 0.0, head - norm, head + norm), tail)
        # Nobody reads this place any more: the pass of the step before, which did, ended at a barrier.
        tl.store(next_ptr + place, v, mask=inside)
        tl.debug_barrier()  # v is there
        _reflect_and_multiply(a_ptr, before_ptr, w_ptr, next_ptr, p_ptr, m, width, ROWS, COLUMNS)
        tl.debug_barrier()  # p and the matrix are there, and the last w is not read any more
        p = factor * tl.load(p_ptr + place, mask=place < m, other=0.0)
        tl.store(w_ptr + place, p - 0.5 * factor * tl.sum(p * v, axis=0) * v, mask=inside)
        tl.debug_barrier()  # w is there, and p is not read any more
        m -= 1
    # The last step, of one value and without a tail, reflects nothing: this one is up to date.
    tl.store(diagonal, tl.load(a_ptr))
    tl.store(beside, 0.0)


@triton.jit(do_not_specialize=["stride", "n_lines"])
def _rank_in_memory(
    gram_ptr, order_ptr, counts_ptr, scratch_ptr, diagonal_ptr, beside_ptr, rank_ptr, wanted, stride, n_lines,
    LEAST: tl.constexpr, SIZE: tl.constexpr, POINTS: tl.constexpr, ROUNDS: tl.constexpr, LARGEST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    n = tl.load(counts_ptr + sample)
    if (n < LEAST) | (n > SIZE):  # of another size
        return
    width = n_lines * _LINE
    a_ptr = scratch_ptr + sample.to(tl.int64) * (stride + 4) * width
    vectors_ptr = a_ptr + stride * width
    gram, order = gram_ptr + sample.to(tl.int64) * stride * stride, order_ptr + sample * stride
    energy = _copy_shares(gram, order, a_ptr, n, stride, width, SIZE, ROWS, COLUMNS)
    _tridiagonal_in_memory(
        a_ptr, vectors_ptr, vectors_ptr + 2 * width, vectors_ptr + 3 * width,
        diagonal_ptr + sample * LARGEST, beside_ptr + sample * LARGEST, n, width, SIZE, ROWS, COLUMNS,
    )  # fmt: skip
    _store_rank(diagonal_ptr, beside_ptr, rank_ptr, sample, energy, wanted, n, SIZE, POINTS, ROUNDS, LARGEST)


def sketch_rank(matrices: Tensor, tolerance: float) -> Tensor:
    """See :func:`sparsevlm.kernels.energy_rank.sketch_rank`."""
    gram = gram_matrices(matrices)
    batch, n = gram.shape[:2]
    # Rows of zeros, of text that does not vote, change no eigenvalue that counts: each matrix is taken by a program of
    # the size that the others fit in, those of other sizes end at once.
    order = torch.empty((batch, n), dtype=torch.int32, device=gram.device)
    counts = torch.empty(batch, dtype=torch.int32, device=gram.device)
    diagonal, beside = torch.empty((2, batch, LARGEST), dtype=torch.float32, device=gram.device)
    ranks = torch.empty(batch, dtype=torch.int64, device=gram.device)
    wanted = (1.0 - tolerance) * (1.0 - _ROUNDING)
    least = 1
    with torch.cuda.device_of(gram):  # the plain path asks from whatever device is current
        most = _IN_REGISTERS if n <= _IN_REGISTERS else LARGEST
        _order_rows[(batch,)](gram, order, counts, ranks, n, most, num_warps=4)
        for size, warps in _SIZES:
            _rank[(batch,)](
                gram, order, counts, diagonal, beside, ranks, wanted, n, least, size, _POINTS, _ROUNDS, LARGEST,
                num_warps=warps,
            )  # fmt: skip
            if size >= n:
                return ranks
            least = size + 1
        n_lines = triton.cdiv(n, _LINE.value)
        # The matrix, and the vectors of its reflections.
        scratch = torch.empty((batch, n + 4, n_lines * _LINE.value), dtype=torch.float32, device=gram.device)
        for size, points, rounds in _LARGE_SIZES:
            _rank_in_memory[(batch,)](
                gram, order, counts, scratch, diagonal, beside, ranks, wanted, n, n_lines,
                least, size, points, rounds, LARGEST, _TILE_ROWS, _TILE_COLUMNS, num_warps=_LARGE_WARPS,
            )  # fmt: skip
            if size >= n:
                break
            least = size + 1
    return ranks
