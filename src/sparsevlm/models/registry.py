"""The supported families, and the adapter of a model."""

from __future__ import annotations

from typing import Any

from .base import Family, ModelAdapter
from .gemma3 import Gemma3Family
from .llava import LlavaFamily
from .qwen2_vl import Qwen2VLFamily
from .qwen3_5 import Qwen3_5Family
from .qwen3_vl import Qwen3VLFamily
from .qwen_omni import OmniFamily
from .wrapping import check_module, wrapper_hint

FAMILIES: tuple[Family, ...] = (
    Qwen2VLFamily(),
    Qwen3VLFamily(),
    Qwen3_5Family(),
    OmniFamily(),
    LlavaFamily(),
    Gemma3Family(),
)


_OWN_INPUTS = (
    "its layers may take inputs of their own for every token, and the last ones keys and values of earlier layers; "
    "neither follows what is dropped"
)
# Classes that cannot be pruned as they are, and why.
_REASONS = {
    "Gemma4ForConditionalGeneration": _OWN_INPUTS,
    "Gemma4UnifiedForConditionalGeneration": _OWN_INPUTS,
    "Gemma3nForConditionalGeneration": _OWN_INPUTS,
    "MllamaForConditionalGeneration": "its images are seen by cross-attention, not by visual tokens among the text",
}


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
    hint = f" The reason: {_REASONS[name]}." if name in _REASONS else wrapper_hint(model)
    if not hint and not any(
        hasattr(part, "visual") or hasattr(part, "vision_tower") for part in (model, getattr(model, "model", None))
    ):
        hint = " It has no vision tower that this library knows; a text-only model has no visual tokens to prune."
    raise NotImplementedError(f"{name} is not supported. Supported are {', '.join(sorted(families))}.{hint}")
