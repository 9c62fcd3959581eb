"""One program per row. Arithmetic in float32, rounded where the plain function rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, size, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(dtype)
        tl.store(sum_ptr + row + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / size + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scaled = (x * scale).to(dtype).to(tl.float32)
    tl.store(out_ptr + row + columns, (weight * scaled).to(dtype), mask=inside)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.norm.rms_norm`."""
    hidden = hidden.contiguous()
    size = hidden.shape[-1]
    out = torch.empty_like(hidden)
    total = hidden if residual is None else torch.empty_like(hidden)
    n_rows = hidden.numel() // size
    if n_rows:
        other = hidden if residual is None else residual.contiguous()
        block = triton.next_power_of_2(size)
        warps = 8 if block > 2048 else 4
        _rms_norm[(n_rows,)](hidden, other, weight, out, total, size, eps, residual is not None, block, num_warps=warps)
    return out, total
