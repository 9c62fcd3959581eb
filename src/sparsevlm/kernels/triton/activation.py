"""One program per row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, size, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * size + columns, (active * up).to(dtype), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See :func:`sparsevlm.kernels.activation.swiglu`."""
    n_rows, size = gate.shape
    out = torch.empty((n_rows, size), dtype=gate.dtype, device=gate.device)
    if n_rows:
        grid = (n_rows, triton.cdiv(size, _BLOCK))
        _swiglu[grid](gate, up, out, size, gate.stride(0), up.stride(0), _BLOCK)
    return out
