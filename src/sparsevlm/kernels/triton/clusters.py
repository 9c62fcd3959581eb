"""Unit rows, nearest centres: a program per row. Plan: one for some tokens, which looks for them among the members."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .score_order import ordered_bits

_MOST_COLUMNS, _BLOCK = 4096, 1024
_TOKENS, _MEMBERS = 16, 256


@triton.jit(do_not_specialize=["n", "most"])
def _unit_rows(states_ptr, chosen_ptr, unit_ptr, own_ptr, n, most, size, COLUMNS: tl.constexpr):
    place, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_chosen = place >= n
    chosen = tl.load(chosen_ptr + sample * most + place - n, mask=is_chosen, other=0)
    state = states_ptr + (sample * n + tl.where(is_chosen, chosen, place)) * size
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        values = tl.load(state + column, mask=column < size, other=0.0).to(tl.float32)
        total += values * values
    length = tl.sqrt_rn(tl.sum(total, axis=0))
    length = tl.where(length < 1e-12, 1e-12, length)
    n_unit, n_own = tl.where(is_chosen, 0, size), tl.where(is_chosen, size, 0)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        values = tl.load(state + column, mask=column < size, other=0.0).to(tl.float32)
        unit = tl.div_rn(values, tl.zeros([COLUMNS], tl.float32) + length)
        tl.store(unit_ptr + (sample * n + place) * size + column, unit, mask=column < n_unit)
        tl.store(own_ptr + (sample * most + place - n) * size + column, unit, mask=column < n_own)


@triton.jit(do_not_specialize=["n", "most"])
def _nearest_centres(similarity_ptr, centres_ptr, is_centre_ptr, out_ptr, n, most, BLOCK: tl.constexpr):
    row, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    similarity = similarity_ptr + (sample * n + row) * most
    n_centres = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        n_centres += (tl.load(is_centre_ptr + sample * n + at, mask=at < n, other=0) != 0).to(tl.int32)
    stop = tl.minimum(tl.sum(n_centres, axis=0), most)
    lowest = -0x7FFFFFFF - 1  # what is not there
    best, nearest = row * 0 + lowest, row * 0
    for start in range(0, stop, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = ordered_bits(tl.load(similarity + at, mask=at < stop, other=0.0))
        key = tl.where(at < stop, key, lowest)
        highest = tl.max(key, axis=0)
        first = tl.min(tl.where(key == highest, at, 0x7FFFFFFF), axis=0)
        nearest = tl.where(highest > best, first, nearest)
        best = tl.maximum(best, highest)
    itself = tl.load(is_centre_ptr + sample * n + row).to(tl.int32) != 0
    centre = tl.load(centres_ptr + sample * most + nearest)
    tl.store(out_ptr + sample * n + row, tl.where(itself, row.to(tl.int64), centre))


@triton.jit(do_not_specialize=["n", "most"])
def _spread_clusters(
    members_ptr, valid_ptr, is_centre_ptr, cluster_ptr, new_centre_ptr, target_ptr, weight_ptr, n, most,
    MEAN: tl.constexpr, TOKENS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    members, valid, clusters = members_ptr + sample * most, valid_ptr + sample * most, cluster_ptr + sample * most
    found = tl.full([TOKENS, MEMBERS], -1, tl.int32)
    for start in range(0, most, MEMBERS):
        at = start + tl.arange(0, MEMBERS)
        counts = tl.load(valid + at, mask=at < most, other=0) != 0
        member = tl.load(members + at, mask=counts, other=-1)
        found = tl.maximum(found, tl.where(member[None, :] == token[:, None], at[None, :], -1))
    place = tl.max(found, axis=1)
    is_member = (place >= 0) & (token < n)
    cluster = tl.load(clusters + place, mask=is_member, other=-1)
    weight = tl.where(is_member, 1.0, 0.0)
    if MEAN:
        size = tl.zeros([TOKENS, MEMBERS], tl.int32)
        for start in range(0, most, MEMBERS):
            at = start + tl.arange(0, MEMBERS)
            counts = tl.load(valid + at, mask=at < most, other=0) != 0
            other = tl.load(clusters + at, mask=counts, other=-2)
            size += (other[None, :] == cluster[:, None]).to(tl.int32)
        size = tl.maximum(tl.sum(size, axis=1), 1).to(tl.float32)
        weight = tl.where(is_member, tl.div_rn(tl.full([TOKENS], 1.0, tl.float32), size), 0.0)
    target = tl.load(members + cluster, mask=is_member, other=-1)
    is_centre = tl.load(is_centre_ptr + sample * most + place, mask=is_member, other=0) != 0
    tl.store(new_centre_ptr + sample * n + token, is_centre, mask=token < n)
    tl.store(target_ptr + sample * n + token, target, mask=token < n)
    tl.store(weight_ptr + sample * n + token, weight, mask=token < n)


def unit_rows(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.clusters.unit_rows`."""
    (batch, n, size), most = states.shape, chosen.shape[1]
    unit = torch.empty((batch, n, size), dtype=torch.float32, device=states.device)
    own = torch.empty((batch, most, size), dtype=torch.float32, device=states.device)
    columns = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size)))
    if states.numel():
        with torch.cuda.device_of(states):  # hooks ask from whatever device is current
            _unit_rows[(n + most, batch)](
                states.contiguous(), chosen.contiguous(), unit, own, n, most, size, columns, num_warps=4
            )
    return unit, own


def nearest_centres(similarity: Tensor, centres: Tensor, is_centre: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.clusters.nearest_centres`."""
    batch, n, most = similarity.shape
    out = torch.empty((batch, n), dtype=torch.int64, device=similarity.device)
    if out.numel():
        with torch.cuda.device_of(similarity):
            _nearest_centres[(n, batch)](
                similarity.contiguous(), centres.contiguous(), is_centre.contiguous(), out, n, most, _BLOCK,
                num_warps=4,
            )  # fmt: skip
    return out


def spread_clusters(
    members: Tensor, valid: Tensor, is_centre: Tensor, cluster_idx: Tensor, n: int, merge: str
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.clusters.spread_clusters`."""
    batch, most = members.shape
    new_centre = torch.empty((batch, n), dtype=torch.bool, device=members.device)
    target = torch.empty((batch, n), dtype=torch.int64, device=members.device)
    weight = torch.empty((batch, n), dtype=torch.float32, device=members.device)
    if target.numel():
        with torch.cuda.device_of(members):
            _spread_clusters[(triton.cdiv(n, _TOKENS), batch)](
                members.contiguous(), valid.contiguous(), is_centre.contiguous(), cluster_idx.contiguous(),
                new_centre, target, weight, n, most, merge == "mean", _TOKENS, _MEMBERS, num_warps=4,
            )  # fmt: skip
    return new_centre, target, weight
