"""Prompts that hold placeholders of images or videos, and bring no pixels for them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .session import Session

NO_IMAGE = "no image or video in the input"
_LEAST_OF_IMAGE = 2  # alone, a token may be text that names it, or what a processor without the image has left


def reason_of_text(session: Session, ids: Tensor, mask: Any = None) -> str:
    """Why nothing is pruned in tokens without pixels; where they hold placeholders a warning is logged once.

    Parameters
    ----------
    session : Session
    ids : Tensor of shape (batch, n), int64
        New tokens of a call, guesses left out.
    mask : Tensor of shape (batch, n) or more columns, optional
        0: padding.

    Raises
    ------
    ValueError
        With ``strict``, where placeholders stand side by side, as those of an image do.
    """
    found = _counts(session, ids, mask)
    if not found:
        return NO_IMAGE
    counts = " and ".join(f"{n} {kind} placeholder{'s' * (n > 1)}" for kind, (n, _) in found.items())
    pixels = " or ".join(session.adapter.modalities[kind].pixels for kind in found)
    message = (
        f"input_ids hold {counts}, but no {pixels} came with them: the model answers without having seen anything, "
        "and nothing is pruned. Pass all that the processor returned, as in model.generate(**inputs)"
    )
    if session.options.config.strict and any(longest >= _LEAST_OF_IMAGE for _, longest in found.values()):
        raise ValueError(f"{message} (strict=True refuses this).")
    session.warn_once("placeholders", f"{message}.")
    return f"input_ids hold {counts}, but no {pixels} came with them"


def _counts(session: Session, ids: Tensor, mask: Any) -> dict[str, tuple[int, int]]:
    """Placeholders by kind, and how many stand side by side at most."""
    by_token = {modality.token_id: kind for kind, modality in reversed(session.adapter.modalities.items())}
    ids = ids.cpu()
    if not bool(torch.isin(ids, torch.tensor([*by_token], device="cpu")).any()):
        return {}
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]:
        ids = ids.masked_fill(mask[:, mask.shape[1] - ids.shape[1] :].cpu() == 0, -1)
    found = dict[str, tuple[int, int]]()
    for token, run in itertools.chain.from_iterable(map(itertools.groupby, ids.tolist())):
        if (kind := by_token.get(token)) is not None:
            n, (before, longest) = sum(1 for _ in run), found.get(kind, (0, 0))
            found[kind] = (before + n, max(longest, n))
    return found
