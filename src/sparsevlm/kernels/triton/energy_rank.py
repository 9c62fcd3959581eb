"""One program per matrix, which it holds whole: Householder's tridiagonal form, then all eigenvalues by bisection.

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
_SIZES = ((16, 4), (32, 4), (64, 4), (LARGEST, 8))
# Sums of equal terms must not miss a threshold that they meet exactly: relative, in float32.
_ROUNDING = 2e-6


@triton.jit(do_not_specialize=["n"])
def _order_rows(gram_ptr, order_ptr, counts_ptr, rank_ptr, n, LARGEST: tl.constexpr):
    """Rows that are not zero, and how many these are; the rank is 0 where there are none."""
    sample = tl.program_id(0)
    rows = tl.arange(0, LARGEST)
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
    tl.debug_barrier()
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
        _order_rows[(batch,)](gram, order, counts, ranks, n, LARGEST, num_warps=4)
        for size, warps in _SIZES:
            _rank[(batch,)](
                gram, order, counts, diagonal, beside, ranks, wanted, n, least, size, _POINTS, _ROUNDS, LARGEST,
                num_warps=warps,
            )  # fmt: skip
            if size >= n:
                break
            least = size + 1
    return ranks
