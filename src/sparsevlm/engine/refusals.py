"""What the engine leaves to the plain path, with the reason that the report gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from ..runtime.request import Request
from ..runtime.view import ModelView
from .selecting import PROVIDED


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
    if view.text_model.training:
        return "training mode"
    if len({parameter.device for parameter in view.text_model.parameters()}) > 1:
        return "layers on several devices"
    reasons = (refuses_layer(layer) for layer in view.layers)
    return next((reason for reason in reasons if reason is not None), None)


def refuses_layer(layer: Any) -> str | None:
    """Why a decoder layer is not for the engine, which uses its parts and calls neither itself nor them."""
    for module in (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
        foreign = [hook for hook in module._forward_hooks.values() if not is_idle(hook)]
        n_known = 1 if module is layer else 0  # this library's own
        if foreign or len(module._forward_pre_hooks) > n_known or "forward" in vars(module):
            return f"something is hooked to {type(module).__name__}, which the engine does not call"
    activation = layer.mlp.act_fn
    if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
        return f"activation {type(activation).__name__}"
    return None


def is_idle(hook: Any) -> bool:
    """Whether this is a hook that transformers leaves behind once outputs of layers were asked for."""
    return str(getattr(hook, "__module__", "")) == "transformers.utils.output_capturing"


def refuses_request(request: Request) -> str | None:
    """Why a request is not for the engine."""
    if missing := sorted(request.traits.needs - PROVIDED):
        return f"selector {request.traits.name!r} needs {', '.join(missing)}"
    if any(sample.plan is None for sample in request.samples):
        return "the rank of the attention decides"
    if request.past_len:
        return "a cache that is not empty"
    return None
