"""Which heads and which text have a say, of several samples and without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import use_triton


def top_heads(mass: Tensor, n_top: int) -> Tensor:
    """An even share in the mean for the ``n_top`` heads with the most attention, none for the others.

    Parameters
    ----------
    mass : Tensor of shape (batch, n_rows, heads), float32
        Attention of each row that counts, 0 of others. Ties go to the lower head.
    n_top : int

    Returns
    -------
    Tensor of shape (batch, heads), float32
    """
    if use_triton(mass):
        from .triton.rater_choice import top_heads as triton_version

        return triton_version(mass, n_top)
    return top_heads_reference(mass, n_top)


def top_heads_reference(mass: Tensor, n_top: int) -> Tensor:
    """Reference in plain torch."""
    total = mass.sum(dim=1)
    order = total.sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(total).scatter_(1, order[:, :n_top], 1 / n_top)


def choose_raters(attention: Tensor, n_text: Tensor) -> tuple[Tensor, Tensor]:
    """Text votes whose attention is at least the mean over the text; at least one of a sample that has some.

    Parameters
    ----------
    attention : Tensor of shape (batch, most_text, n_visual), float32
        0 for visual tokens that only fill up; may be overwritten.
    n_text : Tensor of shape (batch,), int64

    Returns
    -------
    attention : Tensor of the same shape
        0 for text that does not vote.
    is_rater : Tensor of shape (batch, most_text), bool
    """
    if use_triton(attention):
        from .triton.rater_choice import choose_raters as triton_version

        return triton_version(attention, n_text)
    return choose_raters_reference(attention, n_text)


def choose_raters_reference(attention: Tensor, n_text: Tensor) -> tuple[Tensor, Tensor]:
    """Reference in plain torch."""
    is_text = torch.arange(attention.shape[1], device=attention.device) < n_text[:, None]
    is_rater = at_least_mean(attention.sum(dim=-1), is_text)
    return torch.where(is_rater[..., None], attention, 0.0), is_rater


def at_least_mean(mass: Tensor, is_text: Tensor) -> Tensor:
    """Text of at least the mean mass, (batch, n_text); the last where rounding or NaN leaves none."""
    n_text = is_text.sum(dim=1, keepdim=True)
    mass = torch.where(is_text, mass, 0.0)
    mask = (mass >= mass.sum(dim=1, keepdim=True) / n_text.clamp_min(1)) & is_text
    is_last = torch.arange(is_text.shape[1], device=mass.device) == n_text - 1
    return torch.where(mask.any(dim=1, keepdim=True), mask, is_last)
