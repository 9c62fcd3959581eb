"""The attention mask of a pruned layer, gathered from the one that transformers made for the whole sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..request.slots import PAD_SLOT

# Decode steps gather columns at once; a prefill goes sample by sample, so that no index of the mask's size is made.
_GATHER_AT_ONCE = 16


def pruned_mask(
    mask: Any, rows: Tensor | None, slots: Tensor, past_len: int, q_len: int, *, has_padding: bool, flash: bool
) -> Tensor | None:
    """Mask for the rows and slots that are left.

    Every overlay that transformers put into the mask is kept, because entries are only gathered. Dead slots are
    hidden from all rows; filler rows see everything, so that they stay finite.

    Parameters
    ----------
    mask : None or Tensor
        What transformers passes to the layer, in logical coordinates: ``None``, (batch or 1, heads or 1, q_len,
        kv_len) bool or additive float, or (batch, kv_len) for flash attention. Where it is shorter than the sequence,
        by a sliding window, it ends with it.
    rows : Tensor of shape (batch, n_rows), int64, optional
        Row of the forward's sequence that each query row is, -1 for fillers; ``None``: all ``q_len`` rows in order.
    slots : Tensor of shape (batch, n_slots), int64
        Absolute position of each key slot, -1 for dead ones.
    past_len, q_len : int
        Logical length of the cache before this forward, and of the forward's sequence.
    has_padding : bool
        Whether ``slots`` holds dead ones (known without a look at the GPU).
    flash : bool
        Whether the attention takes 2D masks.

    Returns
    -------
    Tensor or None
        In the layout of ``mask``; where that is ``None``, ``None`` if nothing is dead.

    Raises
    ------
    NotImplementedError
        For masks of other kinds (flex attention's ``BlockMask``).
    """
    if mask is None:
        if not has_padding:
            return None
        alive = slots != PAD_SLOT
        return alive if flash else _causal(alive, rows, slots, past_len, q_len)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise NotImplementedError(
            f"an attention mask of type {type(mask).__name__} cannot be pruned. "
            "Use model.set_attn_implementation('sdpa'), 'eager' or 'flash_attention_2'."
        )
    slots = slots.to(mask.device)
    if mask.ndim == 2:
        picked = mask.expand(slots.shape[0], -1).gather(1, slots.clamp_min(0))
        return picked.masked_fill(slots == PAD_SLOT, 0) if has_padding else picked
    first = max(0, past_len + q_len - mask.shape[3])
    return _gathered(mask, None if rows is None else rows.to(mask.device), slots - first, has_padding or first > 0)


def row_mask(mask: Tensor | None, rows: Tensor, *, has_padding: bool) -> Tensor | None:
    """Mask of the rows that a recurrent layer takes in, without fillers.

    Parameters
    ----------
    mask : Tensor of shape (batch, q_len), optional
        What transformers passes to the layer.
    rows : Tensor of shape (batch, n_rows), int64
        Row of the forward's sequence that each row is, -1 for fillers.
    has_padding : bool
        Whether ``rows`` holds fillers.
    """
    if mask is None:
        return rows != PAD_SLOT if has_padding else None
    rows = rows.to(mask.device)
    picked = mask.expand(rows.shape[0], -1).gather(1, rows.clamp_min(0))
    return picked.masked_fill(rows == PAD_SLOT, 0) if has_padding else picked


def _causal(alive: Tensor, rows: Tensor | None, slots: Tensor, past_len: int, q_len: int) -> Tensor:
    if rows is None:
        rows = torch.arange(q_len, device=slots.device).expand(slots.shape[0], -1)
    rows = rows.to(slots.device)
    seen = slots[:, None, :] <= (rows + past_len)[:, :, None]
    return ((alive[:, None, :] & seen) | (rows == PAD_SLOT)[:, :, None]).unsqueeze(1)


def _gathered(mask: Tensor, rows: Tensor | None, slots: Tensor, has_padding: bool) -> Tensor:
    """Columns of ``slots``, of which negative ones are dead, and rows."""
    batch = slots.shape[0]
    mask = mask.expand(batch, *mask.shape[1:])
    columns = slots.clamp_min(0)
    n_rows = mask.shape[2] if rows is None else rows.shape[1]
    if n_rows <= _GATHER_AT_ONCE:
        if rows is not None:
            mask = torch.take_along_dim(mask, rows.clamp_min(0)[:, None, :, None], dim=2)
        picked = torch.take_along_dim(mask, columns[:, None, None, :], dim=3)
    else:
        picked = torch.stack(
            [
                (mask[b] if rows is None else mask[b].index_select(1, rows[b].clamp_min(0))).index_select(2, columns[b])
                for b in range(batch)
            ]
        )
    visible, hidden = (True, False) if picked.dtype == torch.bool else (0.0, torch.finfo(picked.dtype).min)
    if has_padding:
        picked = picked.masked_fill((slots < 0)[:, None, None, :], hidden)
        if rows is not None:
            picked = picked.masked_fill((rows == PAD_SLOT)[:, None, :, None], visible)
    return picked
