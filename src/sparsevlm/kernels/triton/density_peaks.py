"""A program per row: densities and scores read a row of the products once and write one number.

The k nearest are summed without being sorted: a search in the bits of the distances, which order as the distances do,
finds the k-th. Means are summed in float64, so that nothing is left of equal states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..density_peaks import NOISE
from .centre import column_means
from .score_order import ordered_bits

_MOST_COLUMNS = 4096
# A row of up to the last of these is held by its program.
_BLOCKS = (1024, 4096)
_NAN_BITS = tl.constexpr(0x7FFFFFFF)
_INF_BITS = tl.constexpr(0x7F800000)


@triton.jit(do_not_specialize=["n"])
def _points(states_ptr, valid_ptr, mean_ptr, points_ptr, squares_ptr, n, size, root, COLUMNS: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    row = sample * n + tl.program_id(0)
    stop = tl.where(tl.load(valid_ptr + row).to(tl.int32) != 0, size, 0)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        state = tl.load(states_ptr + row * size + column, mask=column < stop, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + sample * size + column, mask=column < stop, other=0.0)
        point = tl.div_rn(state - mean, tl.zeros([COLUMNS], tl.float32) + root)
        tl.store(points_ptr + row * size + column, point, mask=column < size)
        total += point * point
    tl.store(squares_ptr + row, tl.sum(total, axis=0))


@triton.jit
def _distances(products, squares, own, row, at, n, NOISE: tl.constexpr):
    lengths = own + tl.load(squares + at, mask=at < n, other=0.0)
    distance = lengths - 2.0 * tl.load(products + at, mask=at < n, other=0.0)
    distance = tl.where(distance <= NOISE * lengths, 0.0, distance)
    return tl.where(at == row, 0.0, distance)


@triton.jit
def _bits_of_distances(products, squares, valid, own, row, at, n, NOISE: tl.constexpr):
    """Integers that order as the distances, NaN above all; what only fills up is as far as can be."""
    distance = _distances(products, squares, own, row, at, n, NOISE)
    bits = tl.where(distance != distance, _NAN_BITS, distance.to(tl.int32, bitcast=True))  # noqa: PLR0124
    counts = tl.load(valid + at, mask=at < n, other=0) != 0
    return tl.where(counts, bits, tl.where(at < n, _INF_BITS, _NAN_BITS)), counts


@triton.jit
def _below(bits, bound):
    """Sum of the distances below a bound, and their number."""
    is_below = bits < bound
    total = tl.sum(tl.where(is_below, bits.to(tl.float32, bitcast=True), 0.0).to(tl.float64), axis=0)
    return total, tl.sum(is_below.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["n", "n_rows", "first"])
def _log_densities(
    products_ptr, squares_ptr, valid_ptr, n_clusters_ptr, out_ptr, n, n_rows, first,
    NOISE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = first + place
    squares, valid = squares_ptr + sample * n, valid_ptr + sample * n
    products = products_ptr + (sample * n_rows + place) * n
    own = tl.load(squares + row)
    bits, counts = _bits_of_distances(products, squares, valid, own, row, tl.arange(0, BLOCK), n, NOISE)
    n_valid = tl.sum(counts.to(tl.int32), axis=0)
    if not WHOLE:
        for start in range(BLOCK, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            n_valid += tl.sum((tl.load(valid + at, mask=at < n, other=0) != 0).to(tl.int32), axis=0)
    k = tl.maximum(tl.minimum(tl.load(n_clusters_ptr + sample).to(tl.int32), n_valid - 1), 1)
    # The nearest is the row itself: the bound is that of the k + 1 nearest.
    low = row * 0
    high = low + tl.where(tl.load(valid + row).to(tl.int32) != 0, _NAN_BITS, 0)  # nobody reads the others' density
    while low < high:
        middle = low + (high - low) // 2
        n_within = tl.sum((bits <= middle).to(tl.int32), axis=0)
        if not WHOLE:
            for start in range(BLOCK, n, BLOCK):
                at = start + tl.arange(0, BLOCK)
                others, _ = _bits_of_distances(products, squares, valid, own, row, at, n, NOISE)
                n_within += tl.sum((others <= middle).to(tl.int32), axis=0)
        is_enough = n_within > k
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle + 1)
    total, n_below = _below(bits, low)
    if not WHOLE:
        for start in range(BLOCK, n, BLOCK):
            at = start + tl.arange(0, BLOCK)
            others, _ = _bits_of_distances(products, squares, valid, own, row, at, n, NOISE)
            more, n_more = _below(others, low)
            total, n_below = total + more, n_below + n_more
    bound = low.to(tl.float32, bitcast=True).to(tl.float64)
    total += (k + 1 - n_below).to(tl.float64) * bound
    log_density = tl.where(n > 1, 0.0 - total / k.to(tl.float64), float("-inf"))
    tl.store(out_ptr + sample * n_rows + place, log_density.to(tl.float32))


@triton.jit(do_not_specialize=["n", "n_rows", "first"])
def _peak_scores(
    products_ptr, squares_ptr, valid_ptr, log_density_ptr, out_ptr, n, n_rows, first,
    NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = first + place
    squares, valid, log_density = squares_ptr + sample * n, valid_ptr + sample * n, log_density_ptr + sample * n
    products = products_ptr + (sample * n_rows + place) * n
    own, density = tl.load(squares + row), tl.load(log_density + row)
    key = ordered_bits(density)
    nearest, farthest = tl.full([BLOCK], float("inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    n_denser, none_near, none_far = (
        tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    )  # fmt: skip
    for start in range(0, tl.where(tl.load(valid + row).to(tl.int32) != 0, n, 0), BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(valid + at, mask=at < n, other=0) != 0
        other = ordered_bits(tl.load(log_density + at, mask=counts, other=0.0))
        denser = counts & ((other > key) | ((other == key) & (at < row)))
        distance = _distances(products, squares, own, row, at, n, NOISE)
        no_number = distance != distance  # noqa: PLR0124
        n_denser += denser.to(tl.int32)
        none_near += (denser & no_number).to(tl.int32)
        none_far += (counts & no_number).to(tl.int32)
        nearest = tl.where(denser & (distance < nearest), distance, nearest)
        farthest = tl.where(counts & (distance > farthest), distance, farthest)
    near = tl.where(tl.sum(none_near, axis=0) > 0, float("nan"), tl.min(nearest, axis=0))
    far = tl.where(tl.sum(none_far, axis=0) > 0, float("nan"), tl.max(farthest, axis=0))
    separation = tl.where(tl.sum(n_denser, axis=0) == 0, far, near)
    score = density.to(tl.float64) + 0.5 * tl.log(separation.to(tl.float64))
    tl.store(out_ptr + sample * n_rows + place, score.to(tl.float32))


def centred_points(states: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.density_peaks.centred_points`."""
    batch, n, size = states.shape
    states, valid = states.contiguous(), valid.contiguous()
    points = torch.empty((batch, n, size), dtype=torch.float32, device=states.device)
    squares = torch.empty((batch, n), dtype=torch.float32, device=states.device)
    columns = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size)))
    if states.numel():
        with torch.cuda.device_of(states):  # hooks ask from whatever device is current
            mean = column_means(states, valid)
            _points[(n, batch)](states, valid, mean, points, squares, n, size, size**0.5, columns, num_warps=4)
    return points, squares


def log_densities(products: Tensor, squares: Tensor, valid: Tensor, n_clusters: Tensor, first: int) -> Tensor:
    """See :func:`sparsevlm.kernels.density_peaks.log_densities`."""
    batch, n_rows, n = products.shape
    out = torch.empty((batch, n_rows), dtype=torch.float32, device=products.device)
    block = next((block for block in _BLOCKS if n <= block), _BLOCKS[-1])
    if out.numel():
        with torch.cuda.device_of(products):
            _log_densities[(n_rows, batch)](
                products.contiguous(), squares.contiguous(), valid.contiguous(), n_clusters.contiguous(), out,
                n, n_rows, first, NOISE, n <= block, block, num_warps=4,
            )  # fmt: skip
    return out


def peak_scores(products: Tensor, squares: Tensor, valid: Tensor, log_density: Tensor, first: int) -> Tensor:
    """See :func:`sparsevlm.kernels.density_peaks.peak_scores`."""
    batch, n_rows, n = products.shape
    out = torch.empty((batch, n_rows), dtype=torch.float32, device=products.device)
    if out.numel():
        with torch.cuda.device_of(products):
            _peak_scores[(n_rows, batch)](
                products.contiguous(), squares.contiguous(), valid.contiguous(), log_density.contiguous(), out,
                n, n_rows, first, NOISE, _BLOCKS[0], num_warps=4,
            )  # fmt: skip
    return out
