"""What the engine leaves to the plain path, with the reason that the report gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ..kernels.choice import takes_triton
from ..runtime.request import Request
from ..runtime.view import ModelView
from .selecting import NOT_PROVIDED

_HALF = (torch.float16, torch.bfloat16)


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


def refuses_decoder(view: ModelView) -> str | None:
    """Why a decoder is not for the engine; holds until its modules or weights change."""
    weight = view.text_model.embed_tokens.weight
    if weight.is_cuda and weight.dtype not in _HALF:
        return f"weights in {str(weight.dtype).removeprefix('torch.')} on a GPU"
    if len({parameter.device for parameter in view.text_model.parameters()}) > 1:
        return "layers on several devices"
    if weight.is_cuda and not takes_triton(weight):
        return "Triton is not installed"
    layers: Any = view.layers
    for layer in layers:
        attention, mlp, activation = layer.self_attn, layer.mlp, layer.mlp.act_fn
        if not isinstance(activation, nn.SiLU) and type(activation).__name__ != "SiLUActivation":
            return f"activation {type(activation).__name__}"
        linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        for module in (*linear, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            if type(module) is not nn.Linear:  # an adapter can be switched, a graph of it cannot
                return f"a {type(module).__name__} in the place of a linear layer"
    return None


def refuses_tower(view: ModelView) -> str | None:
    """Why a vision tower is not for the engine, likewise."""
    tower: Any = view.vision_tower
    weight = tower.patch_embed.proj.weight
    if weight.is_cuda and weight.dtype not in _HALF:
        return f"weights in {str(weight.dtype).removeprefix('torch.')} on a GPU"
    if len({parameter.device for parameter in tower.parameters()}) > 1:
        return "blocks on several devices"
    for module in (module for block in tower.blocks for module in block.modules()):
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            return f"a {type(module).__name__} in the place of a linear layer"
    return None


def refuses_request(request: Request) -> str | None:
    """Why a request is not for the engine."""
    if missing := sorted(request.traits.needs & NOT_PROVIDED):
        return f"selector {request.traits.name!r} needs {', '.join(missing)}"
    if request.past_len:
        return "a cache that is not empty"
    return None
