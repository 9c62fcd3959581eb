"""Qwen3.5, dense and with experts: gated delta nets, and attention in every fourth layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from .decoder import FULL, RECURRENT, Decoder
from .gridded import TimedFramesFamily


class Qwen3_5Family(TimedFramesFamily):  # noqa: N801 - the model's name
    """Inputs and tower of Qwen3-VL without DeepStack, before a decoder most of whose layers are recurrent."""

    model_types = ("qwen3_5", "qwen3_5_moe")
    class_names = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
    layer_kinds = frozenset({FULL, RECURRENT})

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        text_model = model.model.language_model
        config = text_model.config
        return dataclasses.replace(
            Decoder.of_llama(text_model, model.lm_head, n_position_axes=3),
            experts_per_token=getattr(config, "num_experts_per_tok", None) or 0,
            state_size=state_size(config),
        )


def state_size(config: Any) -> int:
    """Numbers in the state of a gated delta net, by the text model's configuration."""
    return int(config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim)
