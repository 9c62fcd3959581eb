"""Two kernels: one for the nearest neighbours of all rows, by many programs, one for all picks, by one a sample.

A pick is a dependent chain of a maximum and of one row of the matrix: a single program that holds all distances in
registers goes through it faster than many that wait for each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 8, 1024
_ELEMENTS_OF_WARP, _MOST_WARPS = 256, 32


@triton.jit
def _distance(cosine, NOISE: tl.constexpr):
    distance = 1.0 - cosine
    return tl.where(distance > NOISE, distance, 0.0)


@triton.jit
def _find_nearest(
    gram_ptr, scale_ptr, valid_ptr, nearest_ptr, n, NOISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Distance of each row to the nearest valid other one."""
    sample = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    gram = gram_ptr + sample * n * n + rows.to(tl.int64)[:, None] * n
    scale = tl.load(scale_ptr + sample * n + rows, mask=inside, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(0, n, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        known = columns < n
        of_column = tl.load(scale_ptr + sample * n + columns, mask=known, other=0.0)
        valid = tl.load(valid_ptr + sample * n + columns, mask=known, other=0) != 0
        cosine = tl.load(gram + columns[None, :], mask=inside[:, None] & known[None, :], other=0.0)
        cosine = cosine * scale[:, None] * of_column[None, :]
        other = valid[None, :] & (columns[None, :] != rows[:, None])
        highest = tl.maximum(highest, tl.max(tl.where(other, cosine, float("-inf")), axis=1))
    tl.store(nearest_ptr + sample * n + rows, _distance(highest, NOISE), mask=inside)


@triton.jit
def _pick_all(
    gram_ptr, scale_ptr, valid_ptr, nearest_ptr, order_ptr, n, n_keep, NOISE: tl.constexpr, BLOCK: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < n
    at = sample * n + rows
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0)
    valid = tl.load(valid_ptr + at, mask=inside, other=0) != 0
    # Rows that fill up are nearer than any other, picked ones nearer than those, and what is no row the nearest.
    distance = tl.where(valid, float("inf"), tl.where(inside, -1.0, -3.0))
    gain = tl.where(valid, tl.load(nearest_ptr + at, mask=inside, other=0.0), distance)
    for step in range(n_keep):
        _, pick = tl.max(gain, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(order_ptr + sample * n_keep + step, pick.to(tl.int64))
        of_pick = tl.load(scale_ptr + sample * n + pick)
        cosine = tl.load(gram_ptr + (sample * n + pick) * n + rows, mask=inside, other=0.0) * scale * of_pick
        distance = tl.minimum(distance, _distance(cosine, NOISE))
        distance = tl.where(rows == pick, -2.0, distance)
        gain = distance


def farthest_points(gram: Tensor, scale: Tensor, valid: Tensor, n_keep: int, noise: float) -> Tensor:
    """See :func:`sparsevlm.kernels.farthest_points.farthest_points_reference`."""
    batch, n = valid.shape
    gram, scale, valid = gram.contiguous(), scale.contiguous(), valid.contiguous()
    order = torch.empty((batch, n_keep), dtype=torch.int64, device=gram.device)
    nearest = torch.empty_like(scale)
    block = max(16, triton.next_power_of_2(n))
    warps = min(_MOST_WARPS, max(1, block // _ELEMENTS_OF_WARP))
    grid = (triton.cdiv(n, _ROWS), batch)
    with torch.cuda.device_of(gram):  # hooks ask from whatever device is current
        _find_nearest[grid](gram, scale, valid, nearest, n, noise, _ROWS, min(_COLUMNS, block), num_warps=4)
        _pick_all[(batch,)](gram, scale, valid, nearest, order, n, n_keep, noise, block, num_warps=warps)
    return order
