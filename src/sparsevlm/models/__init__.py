"""One adapter per model family: where the decoder, the vision tower and the visual token ids are."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..runtime.view import ModelView
from . import qwen2_vl

# Class name -> adapter. Names, not classes: a family that is not installed costs nothing.
ADAPTERS: dict[str, Callable[[nn.Module], ModelView]] = {
    "Qwen2VLForConditionalGeneration": qwen2_vl.view,
    "Qwen2_5_VLForConditionalGeneration": qwen2_vl.view,
}


def view_of(model: nn.Module) -> ModelView:
    """Find the adapter of a model and look at it.

    Raises
    ------
    TypeError
        If ``model`` is no torch module.
    NotImplementedError
        If no adapter knows its class.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a transformers model, got {type(model).__name__}.")
    for cls in type(model).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__](model)
    name = type(model).__name__
    hint = ""
    if hasattr(model, "_orig_mod"):
        hint = " Of a compiled model pass the original, before torch.compile."
    elif name.startswith("Peft"):
        hint = " For a PEFT model pass model.get_base_model()."
    elif not hasattr(model, "visual") and not hasattr(getattr(model, "model", None), "visual"):
        hint = " It has no vision tower that this library knows; a text-only model has no visual tokens to prune."
    raise NotImplementedError(f"{name} is not supported. Supported are {', '.join(sorted(ADAPTERS))}.{hint}")
