"""What a selector gave back, checked before anything is made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .context import Selection

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_selection(result: Any, hidden_states: Tensor, n_keep: int, name: str) -> Selection:
    """Check what a selector returned and complete the shorthand.

    Costs one synchronisation with the device, and one more each for merges and for recycled rows where there are any.

    Parameters
    ----------
    result : Any
        A :class:`Selection`, or an index tensor.
    hidden_states : Tensor of shape (n_visual, hidden_size)
        What was selected from.
    n_keep : int
        Rows that were asked for.
    name : str
        The selector's.

    Raises
    ------
    TypeError
        If the result or a part of it is no tensor of the right kind.
    ValueError
        If indices are duplicated, unsorted, out of range or of the wrong number, or merges are ill-formed; if the
        states hold NaN, which not every selector looks at.
    """
    selection = result if isinstance(result, Selection) else Selection(keep_idx=result)
    n_visual, device = hidden_states.shape[0], hidden_states.device
    if not _is_whole(selection.keep_idx):
        raise TypeError(f"selector {name!r} must return a Selection or a tensor of whole indices, got {result!r}.")
    keep_idx = selection.keep_idx.to(device=device, dtype=torch.long)
    if keep_idx.shape != (n_keep,):
        got = tuple(keep_idx.shape)
        raise ValueError(f"selector {name!r} returned indices of shape {got}, expected ({n_keep},).")
    is_finite, in_range, ascending = _on_host(
        torch.isfinite(hidden_states).all(),
        ((keep_idx >= 0) & (keep_idx < n_visual)).all(),
        (keep_idx[1:] > keep_idx[:-1]).all(),
    )
    if not is_finite:
        raise ValueError("the visual tokens' states hold NaN or infinity; check the model's inputs and dtype.")
    if not in_range:
        raise ValueError(f"selector {name!r} returned indices outside 0..{n_visual - 1}.")
    if not ascending:
        what = "duplicate" if torch.unique(keep_idx).shape[0] < n_keep else "unsorted"
        raise ValueError(f"selector {name!r} returned {what} indices; they must be sorted and distinct.")
    is_kept = torch.zeros(n_visual, dtype=torch.bool, device=device).index_fill_(0, keep_idx, True)
    return Selection(keep_idx, *_checked_merge(selection, is_kept, name), _checked_recycled(selection, is_kept, name))


def _checked_merge(selection: Selection, is_kept: Tensor, name: str) -> tuple[Tensor | None, Tensor | None]:
    target, weight, n_visual = selection.merge_target, selection.weight, is_kept.shape[0]
    if (target is None) != (weight is None):
        raise ValueError(f"selector {name!r}: merge_target and weight go together.")
    if target is None or weight is None:
        return None, None
    if not _is_whole(target):
        raise TypeError(f"selector {name!r}: merge_target must be a tensor of whole indices, got {target!r}.")
    if not isinstance(weight, Tensor) or weight.dtype == torch.bool or weight.is_complex():
        raise TypeError(f"selector {name!r}: weight must be a tensor of numbers, got {weight!r}.")
    if target.shape != (n_visual,) or weight.shape != (n_visual,):
        raise ValueError(
            f"selector {name!r}: merge_target and weight must have shape ({n_visual},), "
            f"got {tuple(target.shape)} and {tuple(weight.shape)}."
        )
    target = target.to(device=is_kept.device, dtype=torch.long)
    weight = weight.detach().to(device=is_kept.device, dtype=torch.float32)
    itself = torch.arange(n_visual, device=is_kept.device)
    goes_on = torch.where(is_kept, target == itself, (target == -1) | _are_kept(target, is_kept))
    is_finite, fits = _on_host(torch.isfinite(weight).all(), goes_on.all())
    if not is_finite:
        raise ValueError(f"selector {name!r} returned NaN or infinite weights.")
    if not fits:
        raise ValueError(f"selector {name!r}: merge_target must be -1 or a kept row, and a kept row's own index.")
    return target, weight


def _checked_recycled(selection: Selection, is_kept: Tensor, name: str) -> Tensor | None:
    recycled_idx = selection.recycled_idx
    if recycled_idx is None:
        return None
    if not _is_whole(recycled_idx):
        raise TypeError(f"selector {name!r}: recycled_idx must be a tensor of whole indices, got {recycled_idx!r}.")
    if recycled_idx.ndim != 1:
        raise ValueError(f"selector {name!r}: recycled_idx must have one dimension, got {tuple(recycled_idx.shape)}.")
    recycled_idx = recycled_idx.to(device=is_kept.device, dtype=torch.long)
    ordered = recycled_idx.sort().values
    are_part, distinct = _on_host(_are_kept(recycled_idx, is_kept).all(), (ordered[1:] > ordered[:-1]).all())
    if not are_part:
        raise ValueError(f"selector {name!r}: recycled_idx is not a part of keep_idx.")
    if not distinct:
        raise ValueError(f"selector {name!r}: recycled_idx holds a row twice.")
    return recycled_idx


def _are_kept(rows: Tensor, is_kept: Tensor) -> Tensor:
    n_visual = is_kept.shape[0]
    return (rows >= 0) & (rows < n_visual) & is_kept[rows.clamp(0, n_visual - 1)]


def _on_host(*conditions: Tensor) -> list[bool]:
    """Conditions of the device, in one synchronisation."""
    return torch.stack(conditions).tolist()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WHOLE
