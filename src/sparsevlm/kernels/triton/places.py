"""One program per sample, which goes through it in blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 1024, 4


@triton.jit
def _first_picks(order_ptr, n_keep_ptr, valid_ptr, mask_ptr, n_picks, n, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    n_keep = tl.load(n_keep_ptr + sample)
    n_valid = n_keep * 0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = tl.load(valid_ptr + sample * n + at, mask=at < n, other=0)
        n_valid += tl.sum((valid != 0).to(tl.int64), axis=0)
    keeps_all = n_keep >= n_valid
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        valid = tl.load(valid_ptr + sample * n + at, mask=at < n, other=0)
        tl.store(mask_ptr + sample * n + at, (valid != 0) & keeps_all, mask=at < n)
    tl.debug_barrier()
    for start in range(0, tl.where(keeps_all, 0, tl.minimum(n_keep, n_picks)).to(tl.int32), BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = (at < n_picks) & (at < n_keep)
        pick = tl.load(order_ptr + sample * n_picks + at, mask=counts, other=0)
        tl.store(mask_ptr + sample * n + pick, tl.full([BLOCK], 1, tl.int1), mask=counts)


@triton.jit
def _indices_of(mask_ptr, indices_ptr, n, most, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    indices = indices_ptr + sample * most
    count = 0
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = (tl.load(mask_ptr + sample * n + at, mask=at < n, other=0) != 0).to(tl.int32)
        place = count + tl.cumsum(found, axis=0) - 1
        tl.store(indices + place, at.to(tl.int64), mask=(found != 0) & (place < most))
        count += tl.sum(found, axis=0)
    for start in range(count, most, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(indices + at, at.to(tl.int64) * 0, mask=at < most)


def first_picks(order: Tensor, n_keep: Tensor, valid: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.places.first_picks`."""
    order, n_keep, valid = order.contiguous(), n_keep.contiguous(), valid.contiguous()
    mask = torch.empty_like(valid)
    (batch, n), n_picks = valid.shape, order.shape[1]
    if batch:
        with torch.cuda.device_of(order):  # hooks ask from whatever device is current
            _first_picks[(batch,)](order, n_keep, valid, mask, n_picks, n, _BLOCK, num_warps=_WARPS)
    return mask


def indices_of(mask: Tensor, most: int) -> Tensor:
    """See :func:`sparsevlm.kernels.places.indices_of`."""
    mask = mask.contiguous()
    batch, n = mask.shape
    indices = torch.empty((batch, most), dtype=torch.int64, device=mask.device)
    if batch and most:
        with torch.cuda.device_of(mask):
            _indices_of[(batch,)](mask, indices, n, most, _BLOCK, num_warps=_WARPS)
    return indices
