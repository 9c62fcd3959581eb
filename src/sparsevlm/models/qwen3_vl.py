"""Qwen3-VL, dense and with experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from .blocks import with_block
from .decoder import Decoder, LateFeatures
from .gridded import TimedFramesFamily, packed_tower
from .tower import Vision


class Qwen3VLFamily(TimedFramesFamily):
    """Qwen3 decoder with DeepStack, and a tower without windows; frames of a video stand behind written times."""

    model_types = ("qwen3_vl", "qwen3_vl_moe")
    class_names = ("Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration")

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; with experts it runs on hooks only."""
        return with_block(deepstack_decoder(model.model.language_model, model.lm_head, self.tower(model)))

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model."""
        vision = super().vision(model)
        tower: Any = vision.module
        found = [(i, tower.deepstack_visual_indexes.index(i)) for i in sorted(set(tower.deepstack_visual_indexes))]
        program = dataclasses.replace(
            packed_tower(vision),
            position_table=tower.pos_embed,
            late_mergers=tuple((i, tower.deepstack_merger_list[n]) for i, n in found if i < len(tower.blocks)),
        )
        return dataclasses.replace(vision, program=program)


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
        late_features=LateFeatures("visual_pos_masks", "deepstack_visual_embeds", "deepstack_features", n_late),
        experts_per_token=getattr(text_model.config, "num_experts_per_tok", None) or 0,
    )
