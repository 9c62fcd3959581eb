"""A program for some tokens of a sample, each of which finds the numbers of the sample anew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rank_counts import bits_of, share

_BLOCK = 1024


@triton.jit(do_not_specialize=["n", "most_clusters", "tau", "theta"])
def _recycled_rows(
    place_ptr, n_visual_ptr, n_keep_ptr, n_clusters_ptr, is_best_ptr, is_member_ptr, found_ptr, n, most_clusters,
    tau, theta, GIVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    n_visual, n_keep = tl.load(n_visual_ptr + sample), tl.load(n_keep_ptr + sample)
    if GIVEN:
        n_clusters = tl.load(n_clusters_ptr + sample)
    else:
        n_clusters = n_keep * 0
        stop = tl.minimum(n_keep // 4, most_clusters).to(tl.int32) + 1
        for start in range(0, stop, BLOCK):
            number = start + tl.arange(0, BLOCK).to(tl.int64)
            fits = (number < stop) & (share(theta, share(tau, n_visual - n_keep + number)) >= number)
            n_clusters = tl.maximum(n_clusters, tl.max(tl.where(fits, number, 0), axis=0))
    n_best = n_keep - n_clusters
    n_first = n_best + tl.maximum(share(tau, n_visual - n_best), n_clusters)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(place_ptr + sample * n + at, mask=at < n, other=0)
    tl.store(is_best_ptr + sample * n + at, place < n_best, mask=at < n)
    tl.store(is_member_ptr + sample * n + at, (place >= n_best) & (place < n_first), mask=at < n)
    tl.store(found_ptr + sample, n_clusters, mask=tl.program_id(0) == 0)


def recycled_rows(
    place: Tensor, n_visual: Tensor, n_keep: Tensor, n_clusters: Tensor | None, most_kept: int, tau: float, theta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.recycled_rows.recycled_rows`."""
    (batch, n), given = place.shape, n_clusters is not None
    is_best, is_member = torch.empty((2, batch, n), dtype=torch.bool, device=place.device)
    found = torch.empty(batch, dtype=torch.int64, device=place.device)
    numbers = [None if own is None else own.contiguous() for own in (n_visual, n_keep, n_clusters)]
    if batch:
        with torch.cuda.device_of(place):  # hooks ask from whatever device is current
            _recycled_rows[(max(1, triton.cdiv(n, _BLOCK)), batch)](
                place.contiguous(), *numbers, is_best, is_member, found, n, most_kept // 4,
                bits_of(tau), bits_of(theta), given, _BLOCK, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return is_best, is_member, found
