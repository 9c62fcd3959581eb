"""One program per sample, which tries all numbers of dropped tokens.

Numbers are those of the host to the last bit: factors come as the bits of float64, since Triton takes a float for
float32, and no product is fused with the sum behind it.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rank_counts import RankRule

_BLOCK = 1024


@triton.jit
def _share(bits, number):
    """``⌊factor · number⌋``, as the host takes it."""
    factor = bits.to(tl.int64).to(tl.float64, bitcast=True)
    return (factor * number.to(tl.float64) + tl.full([], 1e-9, tl.float64)).to(tl.int64)


@triton.jit
def _clusters(n_dropped, tau, theta, RECYCLES: tl.constexpr):
    found = n_dropped * 0
    if RECYCLES:
        found = _share(theta, _share(tau, n_dropped))
    return found


@triton.jit(do_not_specialize=["most", "min_keep", "rank_lambda", "tau", "theta"])
def _count(
    n_visual_ptr, ranks_ptr, n_keep_ptr, n_clusters_ptr, faulty_ptr, most, min_keep, rank_lambda, tau, theta,
    RECYCLES: tl.constexpr, HAS_FAULTY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    n_visual, rank = tl.load(n_visual_ptr + sample), tl.load(ranks_ptr + sample)
    if HAS_FAULTY:
        tl.store(faulty_ptr, True, mask=rank < 0)
    theirs = _share(rank_lambda, n_visual - tl.maximum(rank, 0))
    stop = tl.maximum(tl.minimum(theirs, most), 0).to(tl.int32) + 1
    chosen = n_visual * 0
    for start in range(0, stop, BLOCK):
        n_dropped = start + tl.arange(0, BLOCK).to(tl.int64)
        n_left = n_visual - n_dropped + _clusters(n_dropped, tau, theta, RECYCLES)
        fits = (n_dropped < stop) & (n_left >= min_keep)
        chosen = tl.maximum(chosen, tl.max(tl.where(fits, n_dropped, 0), axis=0))
    n_clusters = _clusters(chosen, tau, theta, RECYCLES)
    n_keep = n_visual - chosen + n_clusters
    is_whole = (n_visual <= min_keep) | (n_keep >= n_visual)
    tl.store(n_keep_ptr + sample, tl.where(is_whole, n_visual, n_keep))
    tl.store(n_clusters_ptr + sample, tl.where(is_whole, 0, n_clusters))


def rank_counts(
    n_visual: Tensor, ranks: Tensor, most: int, rule: RankRule, is_faulty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.rank_counts.rank_counts`."""
    n_keep, n_clusters = torch.empty((2, *n_visual.shape), dtype=torch.int64, device=n_visual.device)
    factors = [_bits(factor) for factor in (rule.rank_lambda, rule.tau, rule.theta)]
    if n_visual.shape[0]:
        _count[(n_visual.shape[0],)](
            n_visual.contiguous(), ranks.contiguous(), n_keep, n_clusters, n_keep if is_faulty is None else is_faulty,
            most, rule.min_keep, *factors, rule.recycles, is_faulty is not None, _BLOCK,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return n_keep, n_clusters


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
