"""Heads: one program per sample. Raters: one per row of text, each of which adds up the attention of all rows anew."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TEXT, _COLUMNS = 128, 1024


@triton.jit
def _top_heads(mass_ptr, weight_ptr, n_rows, n_top, N_HEADS: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(0, n_rows):
        total += tl.load(mass_ptr + (sample * n_rows + row) * N_HEADS + heads, mask=heads < N_HEADS, other=0.0)
    # NaN before all others, as torch sorts it.
    is_nan = total != total  # noqa: PLR0124
    key = tl.where(is_nan, float("inf"), total)
    one, other = key[:, None], key[None, :]
    above = (other > one) | (is_nan[None, :] & (is_nan[:, None] == 0))
    tied = (other == one) & (is_nan[None, :] == is_nan[:, None]) & (heads[None, :] < heads[:, None])
    ahead = tl.sum(((above | tied) & (heads < N_HEADS)[None, :]).to(tl.int32), axis=1)
    share = tl.div_rn(tl.full([BLOCK], 1.0, tl.float32), tl.zeros([BLOCK], tl.float32) + n_top)
    tl.store(weight_ptr + sample * N_HEADS + heads, tl.where(ahead < n_top, share, 0.0), mask=heads < N_HEADS)


@triton.jit
def _choose_raters(
    attention_ptr, mass_ptr, n_text_ptr, is_rater_ptr, most_text, n_visual, TEXT: tl.constexpr, COLUMNS: tl.constexpr
):
    row, sample = tl.program_id(0), tl.program_id(1)
    n_text = tl.load(n_text_ptr + sample).to(tl.int32)
    mass = mass_ptr + sample * most_text
    total = tl.zeros([TEXT], tl.float32)
    for start in range(0, n_text, TEXT):
        at = start + tl.arange(0, TEXT)
        total += tl.load(mass + at, mask=at < n_text, other=0.0)
    mean = tl.div_rn(tl.sum(total, axis=0), tl.maximum(n_text, 1).to(tl.float32))
    n_above = 0
    for start in range(0, n_text, TEXT):
        at = start + tl.arange(0, TEXT)
        above = (tl.load(mass + at, mask=at < n_text, other=0.0) >= mean) & (at < n_text)
        n_above += tl.sum(above.to(tl.int32), axis=0)
    votes = (tl.load(mass + row) >= mean) & (row < n_text)
    votes = tl.where(n_above > 0, votes, row == n_text - 1)
    tl.store(is_rater_ptr + sample * most_text + row, votes)
    own = attention_ptr + (sample * most_text + row).to(tl.int64) * n_visual
    for start in range(0, tl.where(votes, 0, n_visual), COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        tl.store(own + at, tl.zeros([COLUMNS], tl.float32), mask=at < n_visual)


def top_heads(mass: Tensor, n_top: int) -> Tensor:
    """See :func:`sparsevlm.kernels.rater_choice.top_heads`."""
    batch, n_rows, n_heads = mass.shape
    weight = torch.empty((batch, n_heads), dtype=torch.float32, device=mass.device)
    if batch:
        _top_heads[(batch,)](mass.contiguous(), weight, n_rows, n_top, n_heads, triton.next_power_of_2(n_heads))
    return weight


def choose_raters(attention: Tensor, n_text: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`sparsevlm.kernels.rater_choice.choose_raters`."""
    attention, mass = attention.contiguous(), attention.sum(dim=-1)
    batch, most_text, n_visual = attention.shape
    is_rater = torch.empty((batch, most_text), dtype=torch.bool, device=attention.device)
    if batch and most_text:
        _choose_raters[(most_text, batch)](
            attention, mass, n_text, is_rater, most_text, n_visual, _TEXT, _COLUMNS, num_warps=4
        )
    return attention, is_rater
