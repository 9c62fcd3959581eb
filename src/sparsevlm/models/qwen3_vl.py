"""Qwen3-VL, dense and with experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import Decoder, LateFeatures, Modality
from .gridded import GriddedFamily
from .layout import Layout, grid_coordinates, n_tokens

_DEEPSTACK = LateFeatures(mask="visual_pos_masks", features="deepstack_visual_embeds")


class Qwen3VLFamily(GriddedFamily):
    """Qwen3 decoder with DeepStack, and a tower without windows; frames of a video stand behind written times."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    class_names = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        return deepstack_decoder(model.model.language_model, model.lm_head, self.tower(model))

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images and videos."""
        found = super().modalities(model)
        return {**found, "video": dataclasses.replace(found["video"], in_parts=True)}

    def coordinates(self, layouts: Iterable[Layout], position_ids: Tensor | None, visual: Tensor) -> Tensor:
        """By the grids; M-RoPE counts rows and columns of a frame from where it stands in the prompt."""
        layouts = tuple(layouts)
        fits = sum(map(n_tokens, layouts)) == visual.shape[0]
        if fits or position_ids is None or position_ids.shape[0] != 3:
            return grid_coordinates(layouts, visual)
        time, row, column = position_ids[:, visual]
        return torch.stack((time, row - time, column - time))


def deepstack_decoder(text_model: Any, head: Any, tower: Any) -> Decoder:
    """A decoder of the names of Llama's that adds visual features behind its first layers, perhaps with experts.

    Raises
    ------
    NotImplementedError
        If it adds such behind its last layer, too.
    """
    n_late, n_layers = len(tower.deepstack_visual_indexes), len(text_model.layers)
    if n_late >= n_layers:
        raise NotImplementedError(
            f"deepstack_visual_indexes of the vision tower name {n_late} blocks, the decoder has {n_layers} layers: "
            "features behind the last one cannot follow what is dropped. Supported are fewer blocks than layers."
        )
    return dataclasses.replace(
        Decoder.of_llama(text_model, head, n_position_axes=3),
        late_features=_DEEPSTACK,
        experts_per_token=getattr(text_model.config, "num_experts_per_tok", None) or 0,
    )
