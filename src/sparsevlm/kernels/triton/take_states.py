"""One program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_COLUMNS = 4096


@triton.jit
def _take_states(
    hidden_ptr, rows_ptr, numbers_ptr, states_ptr, valid_ptr, faulty_ptr, most, size, stride, COLUMNS: tl.constexpr
):
    place, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    counts = place < tl.load(numbers_ptr + sample)
    tl.store(valid_ptr + sample * most + place, counts)
    row = tl.load(rows_ptr + sample * stride + place)
    n_faulty = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, size, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        state = tl.load(hidden_ptr + row * size + column, mask=column < size, other=0.0)
        tl.store(states_ptr + (sample * most + place) * size + column, state, mask=column < size)
        n_faulty += 1 - (tl.abs(state.to(tl.float32)) < float("inf")).to(tl.int32)
    tl.store(faulty_ptr, True, mask=counts & (tl.sum(n_faulty, axis=0) > 0))


def take_states(hidden: Tensor, rows: Tensor, numbers: Tensor, is_faulty: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.take_states.take_states`."""
    (batch, most), size = rows.shape, hidden.shape[1]
    states = torch.empty((batch, most, size), dtype=hidden.dtype, device=hidden.device)
    valid = torch.empty((batch, most), dtype=torch.bool, device=hidden.device)
    if batch and most:
        _take_states[(most, batch)](
            hidden, rows, numbers, states, valid, is_faulty, most, size, rows.stride(0),
            min(_MOST_COLUMNS, max(16, triton.next_power_of_2(size))), num_warps=4,
        )  # fmt: skip
    return states, valid
