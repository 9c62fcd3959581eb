"""Parts of example requests: blank images amid words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import ModelAdapter


@dataclass(frozen=True)
class BlankImage:
    """One image without content, as a model is given it.

    Attributes
    ----------
    n_visual : int
        Placeholders that it takes.
    pixels : tuple of int
        Shape of ``pixel_values``; of several images they are joined along the first axis, filled up along the others.
    n_patches : int
        Patches that the vision tower computes of it.
    size : tuple of (str, tuple of int), optional
        Input that tells its size, and what that holds of it.
    around : tuple of int
        Token before and token behind the placeholders; empty: none.
    n_tiles : int
        Parts of equal size that the vision tower sees apart.
    """

    n_visual: int
    pixels: tuple[int, ...]
    n_patches: int
    size: tuple[str, tuple[int, ...]] | None = None
    around: tuple[int, ...] = ()
    n_tiles: int = 1


def blank_word(adapter: ModelAdapter) -> int:
    """Least id that is neither a placeholder nor a special token."""
    taken = {modality.token_id for modality in adapter.modalities.values()} | adapter.special_token_ids
    return next(i for i in range(len(taken) + 1) if i not in taken)


def blank_prompt(adapter: ModelAdapter, images: Sequence[BlankImage], n_text: int) -> Tensor:
    """Placeholders of images behind a quarter of ``n_text`` other tokens, (1, n_visual + n_text), int64.

    Tokens around images count as text, and so does the word that parts two images that have none.

    Raises
    ------
    ValueError
        If so many images need more other tokens.
    """
    word, token = blank_word(adapter), adapter.modalities["image"].token_id
    ids = [word] * (n_text // 4 + 1 - len(images[0].around[:1]))
    for i, image in enumerate(images):
        if i and not image.around:
            ids.append(word)
        ids += [*image.around[:1], *[token] * image.n_visual, *image.around[1:]]
    n_left = n_text + sum(image.n_visual for image in images) - len(ids)
    if n_left < 0:
        raise ValueError(f"{len(images)} images do not fit amid {n_text} other tokens: {n_text - n_left} are needed.")
    return torch.tensor([[*ids, *[word] * n_left]], dtype=torch.int64, device=adapter.model.device)


def blank_inputs(
    adapter: ModelAdapter, images: Sequence[BlankImage], n_text: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Inputs of ``generate`` with images amid ``n_text`` other tokens.

    Parameters
    ----------
    adapter : ModelAdapter
    images : sequence of BlankImage
    n_text : int
    dtype : torch.dtype, optional
        Of the pixels; the model's where omitted.
    """
    ids, device = blank_prompt(adapter, images, n_text), adapter.model.device
    first, *others = zip(*(image.pixels for image in images), strict=True)
    shape = (sum(first), *map(max, others))
    pixels = torch.zeros(shape, dtype=dtype or adapter.model.dtype, device=device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    for name in {image.size[0] for image in images if image.size}:
        found[name] = torch.tensor([image.size[1] for image in images if image.size], device=device)
    return found
