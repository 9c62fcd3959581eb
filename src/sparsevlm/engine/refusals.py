"""What the engine leaves to the plain path, with the reason that the report gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from .. import runtime
from ..runtime.request import Request
from ..runtime.view import ModelView
from .selecting import PROVIDED

_RUNTIME = runtime.__name__


def refuses_generation(model_kwargs: Mapping[str, Any], generation_config: Any) -> str | None:
    """Why a call of ``generate`` is not for the engine, by its options."""
    cache = model_kwargs.get("past_key_values")
    reasons = {
        "an assistant model": bool(getattr(generation_config, "is_assistant", False)),
        "no cache": not model_kwargs.get("use_cache", True) or cache is None,
        "output_attentions": bool(generation_config.output_attentions),
        "output_hidden_states": bool(generation_config.output_hidden_states),
        "a cache that is handed out (return_dict_in_generate)": bool(generation_config.return_dict_in_generate),
        "a cache of the user's": bool(getattr(cache, "_is_user_defined", False)),
        f"a {type(cache).__name__}": cache is not None and type(cache) is not DynamicCache,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def refuses_model(view: ModelView) -> str | None:
    """Why a model is not for the engine, as it is now."""
    text_model, weight = view.text_model, view.text_model.embed_tokens.weight
    if text_model.training:
        return "training mode"
    if weight.is_cuda and weight.dtype not in (torch.float16, torch.bfloat16):
        return f"weights in {str(weight.dtype).removeprefix('torch.')} on a GPU"
    if len({parameter.device for parameter in text_model.parameters()}) > 1:
        return "layers on several devices"
    outside = (view.model, view.base_model, text_model, text_model.embed_tokens, text_model.norm, view.model.lm_head)
    of_layers = (refuses_layer(layer) for layer in view.layers)
    return next((reason for reason in (*map(_hooked, outside), *of_layers) if reason is not None), None)


def refuses_layer(layer: Any) -> str | None:
    """Why a decoder layer is not for the engine, which uses its parts and calls neither itself nor them."""
    for module in (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
        if (reason := _hooked(module)) is not None:
            return reason
    activation = layer.mlp.act_fn
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return f"activation {type(activation).__name__}"
    return None


def _hooked(module: nn.Module) -> str | None:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if all(is_idle(hook) for hook in hooks) and "forward" not in vars(module):
        return None
    return f"something is hooked to {type(module).__name__}, which the engine does not call"


def is_idle(hook: Any) -> bool:
    """Whether this is a hook of this library's plain path, or one that transformers leaves behind once outputs of layers
    were asked for."""
    place = str(getattr(hook, "__module__", ""))
    return place == "transformers.utils.output_capturing" or place.startswith(f"{_RUNTIME}.")


def refuses_request(request: Request) -> str | None:
    """Why a request is not for the engine."""
    if missing := sorted(request.traits.needs - PROVIDED):
        return f"selector {request.traits.name!r} needs {', '.join(missing)}"
    if any(sample.plan is None for sample in request.samples):
        return "the rank of the attention decides"
    if request.past_len:
        return "a cache that is not empty"
    return None
