"""Thinkers of Qwen2.5-Omni and Qwen3-Omni: what sees, hears and writes of these models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Modality, ModelAdapter
from .decoder import Decoder
from .examples import BlankImage
from .gridded import GriddedFamily
from .qwen3_vl import deepstack_decoder


class OmniFamily(GriddedFamily):
    """M-RoPE, and a tower for images and videos; sound is text here, and may stand between the frames of a video."""

    model_types = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
    class_names = ("Qwen2_5OmniThinkerForConditionalGeneration", "Qwen3OmniMoeThinkerForConditionalGeneration")
    speaks = True

    def base_model(self, model: Any) -> Any:
        """The thinker itself in older transformers."""
        return model if hasattr(model, "visual") else model.model

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        base = self.base_model(model)
        text_model = base.model if base is model else base.language_model
        if hasattr(base.visual, "deepstack_visual_indexes"):
            return deepstack_decoder(text_model, model.lm_head, base.visual)
        return Decoder.of_llama(text_model, model.lm_head, n_position_axes=3)

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images and videos."""
        found = super().modalities(model)
        return {**found, "video": dataclasses.replace(found["video"], in_parts=True)}

    def inputs_of(self, adapter: ModelAdapter, images: Sequence[BlankImage], n_text: int) -> dict[str, Tensor]:
        """As the processor makes them, which does not mark the tokens of images."""
        inputs = super().inputs_of(adapter, images, n_text)
        del inputs["mm_token_type_ids"]
        return inputs
