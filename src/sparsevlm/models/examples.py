"""Parts of example requests: blank images amid words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ModelAdapter


@dataclass(frozen=True)
class BlankImage:
    """One image without content, as a model is given it.

    Attributes
    ----------
    n_visual : int
        Placeholders that it takes.
    pixels : tuple of int
        Shape of ``pixel_values``.
    size : tuple of (height, width), optional
        For ``image_sizes``.
    """

    n_visual: int
    pixels: tuple[int, ...]
    size: tuple[int, int] | None = None

    def inputs(self, adapter: ModelAdapter, n_text: int) -> dict[str, Tensor]:
        """Inputs of ``generate`` with the image amid ``n_text`` words."""
        ids, device = blank_prompt(adapter, self.n_visual, n_text), adapter.model.device
        pixels = torch.zeros(self.pixels, dtype=adapter.model.dtype, device=device)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return found if self.size is None else {**found, "image_sizes": torch.tensor([self.size], device=device)}


def blank_prompt(adapter: ModelAdapter, n_visual: int, n_text: int) -> Tensor:
    """Placeholders of one image behind a quarter of ``n_text`` words, (1, n_visual + n_text), int64."""
    tokens = {modality.token_id for modality in adapter.modalities.values()} | adapter.special_token_ids
    word = next(i for i in range(len(tokens) + 1) if i not in tokens)
    ids = torch.full((1, n_visual + n_text), word, dtype=torch.int64, device=adapter.model.device)
    first = n_text // 4 + 1
    ids[:, first : first + n_visual] = adapter.modalities["image"].token_id
    return ids
