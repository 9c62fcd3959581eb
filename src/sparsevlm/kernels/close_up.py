"""Packed samples close up over the rows that do not go on, in place and without waiting for how many these are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import use_triton
from .places import indices_of


@dataclass(frozen=True)
class Packed:
    """Rows of packed samples, and where their tokens are: views of tensors that may have more room.

    Attributes
    ----------
    hidden : Tensor of shape (n_rows, hidden_size)
    cos, sin : Tensor of shape (n_rows, head_dim)
    cu_seqlens : Tensor of shape (batch + 1,), int32
        The first is 0; what is behind the last only fills up.
    n_visual : Tensor of shape (batch,), int64
    visual_rows : Tensor of shape (batch, most_visual), int64
        Row of every visual token, ascending; the first ``n_visual`` count.
    alive, image_idx : Tensor of shape (batch, most_visual), int64
        What goes with these tokens.
    n_text : Tensor of shape (batch,), int64
    text_rows : Tensor of shape (batch, most_text), int64
        Likewise, of text; all of it goes on.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    cu_seqlens: Tensor
    n_visual: Tensor
    visual_rows: Tensor
    alive: Tensor
    image_idx: Tensor
    n_text: Tensor
    text_rows: Tensor


def close_up(packed: Packed, is_kept: Tensor, n_keep: Tensor, most: int) -> Tensor:
    """Let all rows go on but the visual ones that are not kept, which come last.

    Parameters
    ----------
    packed : Packed
        All is brought up to date in place, but ``n_text``; of each sample's visual tokens the first ``most``.
    is_kept : Tensor of shape (batch, most_visual), bool
        False behind the visual tokens of a sample.
    n_keep : Tensor of shape (batch,), int64
        How many are True.
    most : int
        Bound of them.

    Returns
    -------
    Tensor of shape (batch, most), int64
        Indices of the visual tokens that are kept, ascending; 0 behind them.
    """
    if use_triton(is_kept):
        from .triton.close_up import close_up as triton_version

        return triton_version(packed, is_kept, n_keep, most)
    return close_up_reference(packed, is_kept, n_keep, most)


def close_up_reference(packed: Packed, is_kept: Tensor, n_keep: Tensor, most: int) -> Tensor:
    """Reference in plain torch."""
    visual_rows, n_visual, device = packed.visual_rows, packed.n_visual, is_kept.device
    chosen = indices_of(is_kept, most)
    is_visual = torch.arange(is_kept.shape[1], device=device) < n_visual[:, None]
    going_on, place = compact(visual_rows, is_visual & ~is_kept, packed.hidden.shape[0])
    gather_rows_reference(going_on, packed.hidden, packed.cos, packed.sin)
    counts = torch.arange(most, device=device) < n_keep[:, None]
    visual_rows[:, :most] = torch.where(counts, place[visual_rows.gather(1, chosen)], 0)
    for tensor in (packed.alive, packed.image_idx):
        tensor[:, :most] = tensor.gather(1, chosen)
    text_rows = packed.text_rows
    is_text = torch.arange(text_rows.shape[1], device=device) < packed.n_text[:, None]
    text_rows.copy_(torch.where(is_text, place[text_rows], 0))
    packed.cu_seqlens[1:] = (packed.cu_seqlens.diff() - n_visual + n_keep).cumsum(0)
    n_visual.copy_(n_keep)
    return chosen


def compact(visual_rows: Tensor, dropped: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Finds the rows that go on, those that do not behind them.

    Parameters
    ----------
    visual_rows : Tensor of shape (batch, n_visual), int64
    dropped : Tensor of shape (batch, n_visual), bool
    n_rows : int

    Returns
    -------
    rows, place : Tensor of shape (n_rows,), int64
        Row that comes to each place, and place of each row.
    """
    goes_on = torch.ones(n_rows + 1, dtype=torch.bool, device=visual_rows.device)
    # What is not dropped is written to one place behind the end.
    goes_on = goes_on.index_fill_(0, torch.where(dropped, visual_rows, n_rows).flatten(), False)[:n_rows]
    ahead = goes_on.cumsum(dim=0)
    place = torch.where(goes_on, ahead - 1, ahead[-1] + (~goes_on).cumsum(dim=0) - 1)
    everything = torch.arange(n_rows, device=place.device)
    return torch.empty_like(place).scatter_(0, place, everything), place


def gather_rows(rows: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Bring some rows to the first places, in place.

    Parameters
    ----------
    rows : Tensor of shape (n,), int64
    hidden : Tensor of shape (n_rows, hidden_size)
    cos, sin : Tensor of shape (n_rows, head_dim)
    """
    if use_triton(hidden):
        from .triton.close_up import gather_rows as triton_version

        triton_version(rows, hidden, cos, sin)
    else:
        gather_rows_reference(rows, hidden, cos, sin)


def gather_rows_reference(rows: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Reference in plain torch."""
    for tensor in (hidden, cos, sin):
        tensor[: rows.shape[0]].copy_(tensor[rows])
