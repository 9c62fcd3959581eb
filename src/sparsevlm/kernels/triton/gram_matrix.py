"""One kernel for the parts of all rows; their products are torch's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 4096


@triton.jit
def _split(rows_ptr, left_ptr, right_ptr, size, LEFT: tl.constexpr, RIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < size
        value = tl.load(rows_ptr + row * size + column, mask=inside, other=0.0)
        high = value.to(tl.bfloat16)
        low = (value - high.to(tl.float32)).to(tl.bfloat16)
        at = row * 3 * size + column
        if LEFT:
            tl.store(left_ptr + at, high, mask=inside)
            tl.store(left_ptr + at + size, high, mask=inside)
            tl.store(left_ptr + at + 2 * size, low, mask=inside)
        if RIGHT:
            tl.store(right_ptr + at, high, mask=inside)
            tl.store(right_ptr + at + size, low, mask=inside)
            tl.store(right_ptr + at + 2 * size, high, mask=inside)


def split(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.gram_matrix.split`."""
    left, right = (one.new_empty((*one.shape[:-1], 3 * one.shape[-1]), dtype=torch.bfloat16) for one in (rows, others))
    with torch.cuda.device_of(rows):  # hooks ask from whatever device is current
        if others is rows:
            _launch(rows, left, right, True, True)
        else:
            _launch(rows, left, left, True, False)
            _launch(others, right, right, False, True)
    return left, right


def _launch(rows: Tensor, left: Tensor, right: Tensor, has_left: bool, has_right: bool) -> None:
    size = rows.shape[-1]
    if rows.numel():
        columns = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size)))
        _split[(rows.numel() // size,)](rows.contiguous(), left, right, size, has_left, has_right, columns)
