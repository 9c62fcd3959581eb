"""Tokens are brought in the order of their targets, then a program per kept token and some columns adds up its own.

It does so one after the other, in the order of the tokens: the sum is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS, _OTHERS, _MOST_COLUMNS = 16, 256, 1024
_AT_ONCE = 8  # states that are on their way while one is added


@triton.jit(do_not_specialize=["n"])
def _order_by_target(target_ptr, order_ptr, begin_ptr, size_ptr, n, TOKENS: tl.constexpr, OTHERS: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    targets = target_ptr + sample * n
    own = tl.load(targets + token, mask=token < n, other=-1).to(tl.int32)
    ahead, begin, size = (
        tl.zeros([TOKENS, OTHERS], tl.int32), tl.zeros([TOKENS, OTHERS], tl.int32), tl.zeros([TOKENS, OTHERS], tl.int32)
    )  # fmt: skip
    for start in range(0, n, OTHERS):
        at = start + tl.arange(0, OTHERS)
        other = tl.load(targets + at, mask=at < n, other=-1).to(tl.int32)
        joins = (other >= 0)[None, :]
        tied = (other[None, :] == own[:, None]) & (at[None, :] < token[:, None])
        ahead += (joins & ((other[None, :] < own[:, None]) | tied)).to(tl.int32)
        begin += (joins & (other[None, :] < token[:, None])).to(tl.int32)
        size += (other[None, :] == token[:, None]).to(tl.int32)
    tl.store(order_ptr + sample * n + tl.sum(ahead, axis=1), token, mask=(token < n) & (own >= 0))
    tl.store(begin_ptr + sample * n + token, tl.sum(begin, axis=1), mask=token < n)
    tl.store(size_ptr + sample * n + token, tl.sum(size, axis=1), mask=token < n)


@triton.jit(do_not_specialize=["n", "most"])
def _write_merged(
    hidden_ptr, rows_ptr, numbers_ptr, states_ptr, kept_ptr, weight_ptr, order_ptr, begin_ptr, size_ptr,
    n, most, row_stride, hidden_size, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    place, sample = tl.program_id(0), tl.program_id(2).to(tl.int64)
    if place < tl.load(numbers_ptr + sample):
        token = tl.load(kept_ptr + sample * most + place)
        begin, size = tl.load(begin_ptr + sample * n + token), tl.load(size_ptr + sample * n + token)
        order, weights = order_ptr + sample * n + begin, weight_ptr + sample * n
        first = tl.load(order, mask=size > 0, other=0)
        is_alone = (size == 1) & (first == token) & (tl.load(weights + first) == 1.0)
        if (size > 0) & (is_alone == 0):
            column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
            states = states_ptr + sample * n * hidden_size
            total = tl.zeros([COLUMNS], tl.float32)
            for start in range(0, size, AT_ONCE):
                for i in tl.static_range(AT_ONCE):
                    is_there = start + i < size
                    member = tl.load(order + start + i, mask=is_there, other=0)
                    share = tl.load(weights + member, mask=is_there, other=0.0)
                    at = states + member.to(tl.int64) * hidden_size + column
                    state = tl.load(at, mask=column < tl.where(is_there, hidden_size, 0), other=0.0).to(tl.float32)
                    total += state * share
            row = tl.load(rows_ptr + sample * row_stride + place)
            tl.store(hidden_ptr + row * hidden_size + column, total, mask=column < hidden_size)


def write_merged(
    hidden: Tensor, rows: Tensor, numbers: Tensor, states: Tensor, kept: Tensor, target: Tensor, weight: Tensor
) -> None:
    """See :func:`sparsevlm.kernels.merge.write_merged`."""
    (batch, n, size), most, device = states.shape, kept.shape[1], states.device
    if not (batch and n and most):
        return
    order, begin, sizes = torch.empty((3, batch, n), dtype=torch.int32, device=device)
    columns = min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size)))
    with torch.cuda.device_of(states):
        _order_by_target[(triton.cdiv(n, _TOKENS), batch)](
            target.contiguous(), order, begin, sizes, n, _TOKENS, _OTHERS, num_warps=4
        )
        _write_merged[(most, triton.cdiv(size, columns), batch)](
            hidden, rows, numbers.contiguous(), states.contiguous(), kept.contiguous(), weight.contiguous(), order,
            begin, sizes, n, most, rows.stride(0), size, columns, _AT_ONCE, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
