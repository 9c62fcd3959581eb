"""A program for some rows counts how many are ahead of each: no more than n² comparisons, and nothing is sorted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 16, 256


@triton.jit
def ordered_bits(values):
    """Integers in the order of floats: equal ones are equal, NaN is above all."""
    if values.dtype != tl.float64:
        values = values.to(tl.float32)
    values = tl.where(values == 0, 0.0, values)  # there are two zeros
    is_nan = values != values  # noqa: PLR0124
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        bits = tl.where(is_nan, 0x7FFFFFFFFFFFFFFF, bits)
    else:
        bits = values.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        bits = tl.where(is_nan, 0x7FFFFFFF, bits)
    return bits


@triton.jit
def _load_order(scores, valid, at, n):
    counts = tl.load(valid + at, mask=at < n, other=0) != 0
    return ordered_bits(tl.load(scores + at, mask=counts, other=float("-inf"))), counts


@triton.jit(do_not_specialize=["n"])
def _place(
    scores_ptr, valid_ptr, n_keep_ptr, out_ptr, n, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    sample = tl.program_id(1).to(tl.int64)
    scores, valid = scores_ptr + sample * n, valid_ptr + sample * n
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own, counts = _load_order(scores, valid, row, n)
    ahead = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, n, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        other, _ = _load_order(scores, valid, at, n)
        tied = (other[None, :] == own[:, None]) & (at[None, :] < row[:, None])
        ahead += (((other[None, :] > own[:, None]) | tied) & (at < n)[None, :]).to(tl.int32)
    place = tl.sum(ahead, axis=1).to(tl.int64)
    if MASK:
        tl.store(out_ptr + sample * n + row, counts & (place < tl.load(n_keep_ptr + sample)), mask=row < n)
    else:
        tl.store(out_ptr + sample * n + row, place, mask=row < n)


def highest(scores: Tensor, valid: Tensor, n_keep: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.score_order.highest`."""
    return _run(scores, valid, n_keep.contiguous())


def place_by_score(scores: Tensor, valid: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.score_order.place_by_score`."""
    return _run(scores, valid, None)


def _run(scores: Tensor, valid: Tensor, n_keep: Tensor | None) -> Tensor:
    (batch, n), is_mask = scores.shape, n_keep is not None
    out = torch.empty((batch, n), dtype=torch.bool if is_mask else torch.int64, device=scores.device)
    if out.numel():
        with torch.cuda.device_of(scores):  # hooks ask from whatever device is current
            _place[(triton.cdiv(n, _ROWS), batch)](
                scores.contiguous(), valid.contiguous(), n_keep, out, n, is_mask, _ROWS, _COLUMNS, num_warps=4
            )
    return out
