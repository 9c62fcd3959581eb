"""Gemma 4: layers with inputs of their own for every token, and layers that share keys and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .base import Modality, ModelAdapter
from .decoder import Decoder
from .layout import Grid
from .plain import PlainFamily


@dataclass(frozen=True)
class Gemma4Family(PlainFamily):
    """Images of any shape, filled up to one number of patches, each with its place; frames of a video stand apart."""

    video_token: str = "video_token_id"

    def check(self, model: Any) -> None:
        """Refuse text models in which text attends both ways, too.

        Raises
        ------
        NotImplementedError
        """
        super().check(model)
        if model.config.get_text_config().use_bidirectional_attention == "all":
            raise NotImplementedError(
                "use_bidirectional_attention='all' lets every token see those behind it, as models that embed text do, "
                "and masks are gathered for models that write. Supported are 'vision' and None."
            )

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model."""
        decoder = super().decoder(model)
        config = decoder.module.config
        return replace(
            decoder,
            experts_per_token=getattr(config, "top_k_experts", None) or 0,
            per_token=(1,) if getattr(config, "hidden_size_per_layer_input", None) else (),
            n_shared=config.num_kv_shared_layers,
        )

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images, and videos whose frames stand behind written times."""
        kinds = super().modalities(model)
        return {**kinds, "video": replace(kinds["video"], in_parts=True)}

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the places of patches, of each image or frame."""
        places = inputs.get(f"{kind}_position_ids")
        if places is None:
            return None
        frames = self._in_tokens(adapter, places)
        if kind == "image":
            return frames
        if places.ndim == 4:  # as older transformers have it: videos of as many frames each
            return [(places.shape[1], h, w) for _, h, w in frames[:: places.shape[1]]]
        if (counts := inputs.get("num_frames_per_video")) is None:
            return None
        starts = (counts.cumsum(dim=0) - counts).tolist()
        return [(count, *frames[start][1:]) for count, start in zip(counts.tolist(), starts, strict=True)]

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """The same; frames count as images."""
        places = arguments.get("pixel_position_ids")
        return None if places is None else self._in_tokens(adapter, places)

    def patch_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Sequence[tuple[int, int]] | None:
        """Of each image or frame."""
        side = self.patches_per_side(adapter.model)
        found = self.tower_grids(adapter, arguments)
        return None if found is None else [(h * side, w * side) for _, h, w in found]

    def _in_tokens(self, adapter: ModelAdapter, places: Tensor) -> list[Grid]:
        side = self.patches_per_side(adapter.model)
        ends = places.flatten(0, -3).amax(dim=1) + 1
        return [(1, height // side, width // side) for width, height in ends.tolist()]
