"""The supported families, and the adapter of a model."""

from __future__ import annotations

from typing import Any

from .base import Family, ModelAdapter
from .llava import LlavaFamily
from .plain import TiledFamily
from .qwen2_vl import Qwen2VLFamily
from .wrapping import check_module, wrapper_hint

_CUT = "the tokens of a picture in tiles are not those of the tower: margins are cut off, and large pictures scaled"
FAMILIES: tuple[Family, ...] = (
    Qwen2VLFamily(),
    LlavaFamily(("llava",), ("LlavaForConditionalGeneration",)),
    LlavaFamily(("llava_next",), ("LlavaNextForConditionalGeneration",), unreadable=_CUT),
    LlavaFamily(
        ("llava_onevision",), ("LlavaOnevisionForConditionalGeneration",), unreadable=_CUT, video_token="video_token_id"
    ),
    TiledFamily(
        ("internvl",),
        ("InternVLForConditionalGeneration",),
        blocks="encoder.layer",
        attention="attention",
        merge="downsample_ratio",
    ),
)


def supported_model_types() -> tuple[str, ...]:
    """``model_type`` of every checkpoint that is supported."""
    return tuple(name for family in FAMILIES for name in family.model_types)


def adapter_for(model: Any) -> ModelAdapter:
    """Find the family of a model and look at it.

    Parameters
    ----------
    model : PreTrainedModel

    Raises
    ------
    TypeError
        If ``model`` is no torch module.
    NotImplementedError
        If no family has its class, or one refuses it.
    ValueError
        If a checkpoint was loaded with the wrong class.
    """
    check_module(model)
    families = {name: family for family in FAMILIES for name in family.class_names}
    for cls in type(model).__mro__:
        if cls.__name__ in families:
            return ModelAdapter.of(families[cls.__name__], model)
    name = type(model).__name__
    hint = wrapper_hint(model)
    if not hint and not any(
        hasattr(part, "visual") or hasattr(part, "vision_tower") for part in (model, getattr(model, "model", None))
    ):
        hint = " It has no vision tower that this library knows; a text-only model has no visual tokens to prune."
    raise NotImplementedError(f"{name} is not supported. Supported are {', '.join(sorted(families))}.{hint}")
