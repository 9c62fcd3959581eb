"""Gemma 3: images that see both ways in a decoder some of whose layers have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Decoder, Family, Grid, Modality, ModelAdapter, Vision


class Gemma3Family(Family):
    """Layers with a sliding window and without, and a tower that gives every image, or crop of one, as many tokens."""

    model_types = ("gemma3",)
    class_names = ("Gemma3ForConditionalGeneration",)

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        return Decoder.of_llama(model.model.language_model, model.lm_head)

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model; it is not read where patches are pooled, as these lie row by row."""
        tower = model.model.vision_tower
        named = (module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
        blocks = list(next(named, ()))
        n_pooled = (_patches_per_side(model) // _tokens_per_side(model)) ** 2
        readable = tuple((i, block.self_attn) for i, block in enumerate(blocks)) if n_pooled == 1 else ()
        return Vision(tower, readable, len(blocks), n_pooled)

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images."""
        return {"image": Modality("pixel_values", model.config.image_token_id)}

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the number of images."""
        return self.tower_grids(adapter, inputs)

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """From the number of images."""
        pixels = arguments.get("pixel_values")
        side = _tokens_per_side(adapter.model)
        return None if pixels is None else [(1, side, side)] * pixels.shape[0]


def _patches_per_side(model: Any) -> int:
    vision = model.config.vision_config
    return int(vision.image_size // vision.patch_size)


def _tokens_per_side(model: Any) -> int:
    return int(model.config.mm_tokens_per_image**0.5)
