"""Models inside of wrappers, PEFT's and torch's, and modules that torch compiles."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn


def check_module(model: Any) -> None:
    """Refuse what is no module.

    Raises
    ------
    TypeError
        With what was got, and where the model is, if that is known.
    """
    if isinstance(model, nn.Module):
        return
    got, hint = type(model).__name__, ""
    if isinstance(model, type):
        got, hint = f"the class {model.__name__} itself", ": make a model of it first, with from_pretrained"
    elif isinstance(model, str):
        got, hint = f"str ({model!r})", ": load the model first, with from_pretrained"
    elif isinstance(inner := getattr(model, "model", None), nn.Module):  # a pipeline, a trainer
        hint = f": pass its model, {got}.model, a {type(inner).__name__}"
    raise TypeError(f"expected a transformers model, got {got}{hint}.")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's wrappers, whose ``generate`` calls that of the model; any other as it is."""
    peft = sys.modules.get("peft")
    kinds = tuple(getattr(peft, name) for name in ("PeftModel", "PeftMixedModel") if hasattr(peft, name))
    while isinstance(model, kinds):
        inner: Any = model
        # A mixed model hands what it lacks on to its tuner, which holds the model.
        model = inner.get_base_model() if hasattr(type(inner), "get_base_model") else inner.base_model.model
    return model


def wrapper_hint(model: nn.Module) -> str:
    """The attribute of a wrapper that holds the model, as the remedy of an error; empty where there is none."""
    if hasattr(model, "_orig_mod"):
        return " Of a compiled model pass the original, before torch.compile."
    if isinstance(getattr(model, "module", None), nn.Module):  # DataParallel, DistributedDataParallel, FSDP, DeepSpeed
        return " Of a model that is wrapped to be spread pass what it wraps, model.module."
    if isinstance(getattr(model, "thinker", None), nn.Module):
        return " Of a model that speaks pass what sees and writes, model.thinker."
    return ""


def compiled_parts(model: nn.Module, hooked: Iterable[Any]) -> list[str]:
    """Names of a model's compiled modules that are hooked, or hold such: the empty name is the model itself.

    Parameters
    ----------
    model : nn.Module
    hooked : iterable of nn.Module
        Modules that get hooks.
    """
    ours = {id(module) for module in hooked}
    return [
        name
        for name, module in model.named_modules()
        if _is_compiled(module) and any(id(part) in ours for part in module.modules())
    ]


def may_have_compiled() -> bool:
    """Tells whether torch has compiled anything in this process, or cannot say.

    To forget what was compiled takes seconds on a GPU, where it imports the whole of torch's compiler.
    """
    frames = sys.modules.get("torch._dynamo.convert_frame")
    if frames is None:
        return False
    seen = getattr(getattr(frames, "input_codes", None), "seen", None)
    return seen is None or bool(seen)


def _is_compiled(module: Any) -> bool:
    if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
        return True
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
