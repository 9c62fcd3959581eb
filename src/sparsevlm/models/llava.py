"""LLaVA-1.5 and checkpoints of its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import Decoder, Family, Grid, Modality, ModelAdapter, Vision


class LlavaFamily(Family):
    """Llama-like decoder with positions of one axis, and a tower that gives every image as many tokens."""

    model_types = ("llava",)
    class_names = ("LlavaForConditionalGeneration",)

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        return Decoder.of_llama(model.model.language_model, model.lm_head)

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model, as far as the block whose output is taken."""
        tower = model.model.vision_tower
        named = (module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
        blocks = list(next(named, ()))
        taken = model.config.vision_feature_layer
        # Outputs are counted from the embeddings on: the last of n blocks is output n, or -1.
        counts = [index if index >= 0 else len(blocks) + 1 + index for index in _listed(taken)]
        n_blocks = min(max(counts), len(blocks))
        return Vision(
            module=tower,
            readable=tuple((i, block.self_attn) for i, block in enumerate(blocks[:n_blocks])),
            n_blocks=n_blocks,
            n_prefix=int(_drops_class_token(model)),
        )

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images."""
        return {"image": Modality("pixel_values", model.config.image_token_id)}

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the size of the pixels."""
        return self.tower_grids(adapter, inputs)

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """From the size of the pixels; unknown where class tokens stay, or images differ in size."""
        pixels, config = arguments.get("pixel_values"), adapter.model.config
        if pixels is None or not _drops_class_token(adapter.model) or arguments.get("image_sizes") is not None:
            return None
        height, width = (int(length) // config.vision_config.patch_size for length in pixels.shape[-2:])
        return [(1, height, width)] * pixels.shape[0]


def _drops_class_token(model: Any) -> bool:
    return bool(model.config.vision_feature_select_strategy == "default")


def _listed(value: Any) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
