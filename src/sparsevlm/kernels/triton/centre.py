"""Three kernels: the mean of every column, the rows without it and their lengths, and the scale that these have.

Means are summed in float64: of equal states nothing is left then, where sums in float32 would leave more than rounding
of many of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..centre import ROUNDING

_ROWS, _COLUMNS = 64, 32
_MOST_COLUMNS, _LENGTHS, _SCALED = 4096, 1024, 4


@triton.jit
def _column_means(states_ptr, valid_ptr, mean_ptr, n, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    n_valid = tl.zeros([ROWS], tl.int32)
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = tl.load(valid_ptr + sample * n + row, mask=row < n, other=0) != 0
        at = (sample * n + row)[:, None] * size + column[None, :]
        total += tl.load(states_ptr + at, mask=valid[:, None] & (column < size)[None, :], other=0.0).to(tl.float64)
        n_valid += valid.to(tl.int32)
    mean = tl.sum(total, axis=0) / tl.maximum(tl.sum(n_valid, axis=0), 1).to(tl.float64)
    tl.store(mean_ptr + sample * size + column, mean.to(tl.float32), mask=column < size)


@triton.jit
def _subtract(states_ptr, valid_ptr, mean_ptr, out_ptr, before_ptr, length_ptr, n, size, COLUMNS: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * n + tl.program_id(0)
    stop = tl.where(tl.load(valid_ptr + row).to(tl.int32) != 0, size, 0)
    before, length = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        state = tl.load(states_ptr + row * size + column, mask=column < stop, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + tl.program_id(1) * size + column, mask=column < stop, other=0.0)
        left = state - mean
        tl.store(out_ptr + row * size + column, left, mask=column < size)
        before += state * state
        length += left * left
    tl.store(before_ptr + row, tl.sqrt(tl.sum(before, axis=0)))
    tl.store(length_ptr + row, tl.sqrt(tl.sum(length, axis=0)))


@triton.jit
def _scale(
    out_ptr, valid_ptr, before_ptr, length_ptr, n, size,
    ROUNDING: tl.constexpr, LENGTHS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    longest, total = tl.zeros([LENGTHS], tl.float32), tl.zeros([LENGTHS], tl.float32)
    n_valid = tl.zeros([LENGTHS], tl.int32)
    for start in range(0, n, LENGTHS):
        row = start + tl.arange(0, LENGTHS)
        longest = tl.maximum(longest, tl.load(before_ptr + sample * n + row, mask=row < n, other=0.0))
        total += tl.load(length_ptr + sample * n + row, mask=row < n, other=0.0)
        n_valid += (tl.load(valid_ptr + sample * n + row, mask=row < n, other=0) != 0).to(tl.int32)
    rounding = ROUNDING * tl.max(longest, axis=0)
    mean = tl.sum(total, axis=0) / tl.maximum(tl.sum(n_valid, axis=0), 1).to(tl.float32)
    mean = tl.where(mean < 1e-30, 1e-30, mean)
    for i in range(ROWS):
        row = tl.program_id(0) * ROWS + i
        if row < n:
            length = tl.load(length_ptr + sample * n + row)
            for start in range(0, size, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                at = out_ptr + (sample * n + row) * size + column
                scaled = tl.load(at, mask=column < size, other=0.0) / mean
                tl.store(at, tl.where(length <= rounding, 0.0, scaled), mask=column < size)


def centre(states: Tensor, valid: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.centre.centre`."""
    batch, n, size = states.shape
    states, valid = states.contiguous(), valid.contiguous()
    out = states if states.dtype == torch.float32 else torch.empty_like(states, dtype=torch.float32)
    mean = torch.empty((batch, size), dtype=torch.float32, device=states.device)
    before, length = torch.empty((2, batch, n), dtype=torch.float32, device=states.device)
    columns = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size)))
    if states.numel():
        with torch.cuda.device_of(states):  # hooks ask from whatever device is current
            _column_means[(triton.cdiv(size, _COLUMNS), batch)](states, valid, mean, n, size, _ROWS, _COLUMNS)
            _subtract[(n, batch)](states, valid, mean, out, before, length, n, size, columns)
            _scale[(triton.cdiv(n, _SCALED), batch)](
                out, valid, before, length, n, size, ROUNDING, _LENGTHS, _SCALED, columns
            )
    return out
