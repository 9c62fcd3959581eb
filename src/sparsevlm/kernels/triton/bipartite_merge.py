"""A program per even row finds its partner, one per sample merges the pairs, one per row that is left adds up its own.

Which pairs merge is found without sorting: a search in the bits of the scores finds the lowest that still does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .score_order import ordered_bits

_BLOCK, _MOST_COLUMNS = 1024, 4096
_AT_ONCE = 4  # rows that are on their way while one is added
_HIGHEST = tl.constexpr(0x7FFFFFFF)
_NOWHERE = tl.constexpr(1 << 30)


@triton.jit(do_not_specialize=["n_even", "n_odd"])
def _best_partners(similarity_ptr, n_left_ptr, score_ptr, partner_ptr, n_even, n_odd, BLOCK: tl.constexpr):
    row, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    similarity = similarity_ptr + (sample * n_even + row) * n_odd
    stop = tl.minimum((tl.load(n_left_ptr + sample) // 2).to(tl.int32), n_odd)
    lowest = -0x7FFFFFFF - 1  # what is not there
    best, partner = row * 0 + lowest, row * 0
    for start in range(0, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = ordered_bits(tl.load(similarity + at, mask=at < stop, other=0.0))
        key = tl.where(at < stop, key, lowest)
        highest = tl.max(key, axis=0)
        first = tl.min(tl.where(key == highest, at, 0x7FFFFFFF), axis=0)
        partner = tl.where(highest > best, first, partner)
        best = tl.maximum(best, highest)
    out = sample * n_even + row
    tl.store(score_ptr + out, tl.load(similarity + partner, mask=stop > 0, other=float("-inf")))
    tl.store(partner_ptr + out, partner.to(tl.int64))


@triton.jit
def _keys(scores, at, stop):
    return ordered_bits(tl.load(scores + at, mask=at < stop, other=0.0)), at < stop


@triton.jit
def _lowest_that_merges(scores, n, n_merged, BLOCK: tl.constexpr):
    """The bits of the lowest of the highest scores, and how many scores are above."""
    least, most = tl.full([BLOCK], _HIGHEST, tl.int32), tl.full([BLOCK], -_HIGHEST - 1, tl.int32)
    for start in range(0, n, BLOCK):
        key, counts = _keys(scores, start + tl.arange(0, BLOCK), n)
        least = tl.minimum(least, tl.where(counts, key, _HIGHEST))
        most = tl.maximum(most, tl.where(counts, key, -_HIGHEST - 1))
    low, high = tl.min(least, axis=0).to(tl.int64), tl.max(most, axis=0).to(tl.int64)
    high = tl.where(n_merged == n, low, high)
    while low < high:
        middle = high - (high - low) // 2
        within = tl.zeros([BLOCK], tl.int32)
        for start in range(0, n, BLOCK):
            key, counts = _keys(scores, start + tl.arange(0, BLOCK), n)
            within += (counts & (key >= middle)).to(tl.int32)
        is_enough = tl.sum(within, axis=0) >= n_merged
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        key, counts = _keys(scores, start + tl.arange(0, BLOCK), n)
        above += (counts & (key > low)).to(tl.int32)
    return low, tl.sum(above, axis=0)


@triton.jit
def _mark_gone(scores, marks, n, n_merged, BLOCK: tl.constexpr):
    """Writes for every even row twice the number of rows that are gone up to it, and 1 more if it is one of them."""
    low, n_above = _lowest_that_merges(scores, n, n_merged, BLOCK)
    n_tied, n_gone = n_merged * 0, n_merged * 0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key, counts = _keys(scores, at, n)
        tied = (counts & (key == low)).to(tl.int32)
        is_first = n_tied + tl.cumsum(tied, axis=0) <= n_merged - n_above
        gone = ((counts & (key > low)) | ((tied != 0) & is_first)).to(tl.int32)
        tl.store(marks + at, 2 * (n_gone + tl.cumsum(gone, axis=0)) + gone, mask=counts)
        n_tied += tl.sum(tied, axis=0)
        n_gone += tl.sum(gone, axis=0)


@triton.jit
def _new_place(marks, partners, row, counts):
    """Where rows come to, and which of them are gone."""
    is_gone = ((tl.load(marks + row // 2, mask=counts, other=0) & 1) != 0) & (row % 2 == 0)
    partner = tl.load(partners + row // 2, mask=counts & is_gone, other=0).to(tl.int32)
    into = tl.where(is_gone, 2 * partner + 1, row)
    return into - (tl.load(marks + into // 2, mask=counts, other=0) >> 1), is_gone


@triton.jit(do_not_specialize=["n_even", "n_rows", "n"])
def _merge_best_pairs(
    score_ptr, partner_ptr, n_left_ptr, n_keep_ptr, row_of_ptr, is_kept_ptr, marks_ptr, places_ptr, n_even, n_rows, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    n_left, n_keep = tl.load(n_left_ptr + sample), tl.load(n_keep_ptr + sample)
    n_merged = tl.maximum(tl.minimum(n_left // 2, n_left - n_keep), 0).to(tl.int32)
    marks, partners = marks_ptr + sample * n_even, partner_ptr + sample * n_even
    if n_merged > 0:
        _mark_gone(score_ptr + sample * n_even, marks, ((n_left + 1) // 2).to(tl.int32), n_merged, BLOCK)
        tl.debug_barrier()
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            row = tl.load(row_of_ptr + sample * n + at, mask=at < n, other=-1).to(tl.int32)
            place, is_gone = _new_place(marks, partners, row, row >= 0)
            tl.store(row_of_ptr + sample * n + at, place.to(tl.int64), mask=row >= 0)
            tl.store(is_kept_ptr + sample * n + at, tl.zeros([BLOCK], tl.int1), mask=(row >= 0) & is_gone)
        tl.store(n_left_ptr + sample, n_left - n_merged)
    stop = tl.where((n_merged > 0) & (n_left - n_merged > n_keep), n_left, 0)
    for start in range(0, n_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        place, _ = _new_place(marks, partners, row, row < stop)
        tl.store(places_ptr + sample * n_rows + row, tl.where(row < stop, place, -1).to(tl.int64), mask=row < n_rows)


@triton.jit(do_not_specialize=["n", "most"])
def _merged_rows(
    rows_ptr, places_ptr, sums_ptr, unit_ptr, n, most, size,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    place, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, places, out = rows_ptr + sample * n * size, places_ptr + sample * n, (sample * most + place) * size
    squares = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros([COLUMNS], tl.float64)
        for start in range(0, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            found = tl.where(tl.load(places + at, mask=at < n, other=-1) == place, at, _NOWHERE)
            for _first in range(0, tl.sum((found < _NOWHERE).to(tl.int32), axis=0), AT_ONCE):
                for _i in tl.static_range(AT_ONCE):
                    row = tl.min(found, axis=0)
                    inside = column < tl.where(row < _NOWHERE, size, 0)
                    total += tl.load(rows + row.to(tl.int64) * size + column, mask=inside, other=0.0).to(tl.float64)
                    found = tl.where(found == row, _NOWHERE, found)
        found_sum = total.to(tl.float32)
        tl.store(sums_ptr + out + column, found_sum, mask=column < size)
        squares += found_sum * found_sum
    length = tl.sqrt_rn(tl.sum(squares, axis=0))
    length = tl.where(length < 1e-12, 1e-12, length)
    tl.debug_barrier()
    for first in range(0, size, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        values = tl.load(sums_ptr + out + column, mask=column < size, other=0.0)
        unit = tl.div_rn(values, tl.zeros([COLUMNS], tl.float32) + length)
        tl.store(unit_ptr + out + column, unit, mask=column < size)


def best_partners(similarity: Tensor, n_left: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.bipartite_merge.best_partners`."""
    batch, n_even, n_odd = similarity.shape
    score = torch.empty((batch, n_even), dtype=torch.float32, device=similarity.device)
    partner = torch.empty((batch, n_even), dtype=torch.int64, device=similarity.device)
    if score.numel():
        with torch.cuda.device_of(similarity):  # hooks ask from whatever device is current
            _best_partners[(n_even, batch)](
                similarity.contiguous(), n_left, score, partner, n_even, n_odd, _BLOCK, num_warps=4
            )
    return score, partner


def merge_best_pairs(
    score: Tensor, partner: Tensor, n_left: Tensor, n_keep: Tensor, row_of: Tensor, is_kept: Tensor, n_rows: int
) -> Tensor:
    """See :func:`sparsevlm.kernels.bipartite_merge.merge_best_pairs`."""
    (batch, n_even), n = score.shape, row_of.shape[1]
    places = torch.empty((batch, n_rows), dtype=torch.int64, device=score.device)
    marks = torch.empty((batch, n_even), dtype=torch.int32, device=score.device)
    if places.numel():
        with torch.cuda.device_of(score):
            _merge_best_pairs[(batch,)](
                score.contiguous(), partner.contiguous(), n_left, n_keep.contiguous(), row_of, is_kept, marks, places,
                n_even, n_rows, n, _BLOCK, num_warps=8,
            )  # fmt: skip
    return places


def merged_rows(rows: Tensor, places: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.bipartite_merge.merged_rows`."""
    batch, n, size = rows.shape
    sums, unit = (torch.empty((batch, most, size), dtype=torch.float32, device=rows.device) for _ in range(2))
    columns = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size)))
    if sums.numel():
        with torch.cuda.device_of(rows):
            _merged_rows[(most, batch)](
                rows.contiguous(), places.contiguous(), sums, unit, n, most, size, _BLOCK, columns, _AT_ONCE,
                num_warps=8,
            )  # fmt: skip
    return sums, unit
