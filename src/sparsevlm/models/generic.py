"""Any model that looks like a text model behind a vision tower: found by configuration and structure, on request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .base import Modality
from .decoder import Decoder
from .plain import PlainFamily
from .tower import Vision

_TOWERS = ("visual", "vision_tower", "vision_model", "vision_encoder", "image_tower")
_TOKENS = ("image_token_id", "image_token_index")
_PARTS = ("embed_tokens", "norm", "rotary_emb", "layers")


@dataclass(frozen=True)
class GenericFamily(PlainFamily):
    """What is found by its usual names; the first request has to prove that it may be pruned."""

    must_be_proven: bool = True

    def check(self, model: Any) -> None:
        """Refuse a model in which something is not found, with what was.

        Raises
        ------
        NotImplementedError
        """
        missing = [
            wanted
            for wanted, found in (
                (f"an image token in its configuration ({' or '.join(_TOKENS)})", image_token(model)),
                (f"a text model with {', '.join(_PARTS)}", text_model(model)),
                (f"a vision tower ({', '.join(_TOWERS)})", tower_of(model)),
                ("output embeddings", model.get_output_embeddings()),
            )
            if found is None
        ]
        if missing:
            raise NotImplementedError(
                f"family='generic' does not find in this {type(model).__name__}: {'; '.join(missing)}. Describe the "
                "model by a family of its own, and call sparsevlm.register_adapter (docs/adding_a_model.md)."
            )
        super().check(model)

    def base_model(self, model: Any) -> Any:
        """The module that holds text model and tower."""
        return model.model

    def decoder(self, model: Any) -> Decoder:
        """The text model."""
        return Decoder.of_llama(text_model(model), model.get_output_embeddings())

    def vision(self, model: Any) -> Vision:
        """The vision tower, of which nothing is read."""
        return Vision(tower_of(model), (), 0, unreadable="family='generic' does not know its blocks")

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images, and videos where they have a placeholder of their own."""
        token = image_token(model)
        assert token is not None
        kinds = {"image": Modality("pixel_values", token)}
        video = getattr(model.config, "video_token_id", None)
        if video is not None and video != token:
            kinds["video"] = Modality("pixel_values_videos", video)
        return kinds


def image_token(model: Any) -> int | None:
    """Placeholder of images by the configuration."""
    found = (getattr(model.config, name, None) for name in _TOKENS)
    return next((token for token in found if isinstance(token, int)), None)


def text_model(model: Any) -> Any:
    """The text model, if it is built like transformers' Llama."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else None
    if text is None or text is getattr(model, "model", None) or any(not hasattr(text, part) for part in _PARTS):
        return None
    return text if all(hasattr(layer, "self_attn") for layer in text.layers) else None


def tower_of(model: Any) -> nn.Module | None:
    """The vision tower by its name."""
    base = getattr(model, "model", None)
    found = (getattr(base, name, None) for name in _TOWERS)
    return next((tower for tower in found if isinstance(tower, nn.Module)), None)
