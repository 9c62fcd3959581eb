"""MiniCPM-V 4.6: slices of images before the hybrid text model of Qwen3.5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .base import ModelAdapter
from .decoder import FULL, RECURRENT, Decoder
from .layout import Grid
from .plain import PlainFamily
from .qwen3_5 import state_size

_SIZES = {"image": "target_sizes", "video": "target_sizes_videos"}


@dataclass(frozen=True)
class MiniCPMVFamily(PlainFamily):
    """Slices and frames of any shape stand apart in the prompt; each counts as an image."""

    layer_kinds: ClassVar[frozenset[str]] = frozenset({FULL, RECURRENT})
    packs_pixels: ClassVar[bool] = True
    blocks: str = ""
    unreadable: str = "patches are joined in the middle of it"
    video_token: str = "video_token_id"

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model; it runs on hooks only."""
        decoder = super().decoder(model)
        return replace(decoder, state_size=state_size(decoder.module.config))

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the sizes in patches, of which more form one token under ``downsample_mode="16x"``."""
        config = adapter.model.config
        if (sizes := inputs.get(_SIZES[kind])) is None:
            return None
        joins = (inputs.get("downsample_mode") or config.downsample_mode) != "4x"
        height, width = ((1 + joins) * side**config.merger_times for side in config.merge_kernel_size)
        return [(1, h // height, w // width) for h, w in sizes.tolist()]
