"""What the engine leaves to the plain path, with the reason that the report gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat import cache_of
from ..kernels.choice import trouble
from ..runtime.request import Request
from ..runtime.view import ModelView
from .selecting import NOT_PROVIDED

# Methods that the engine calls none of, or goes past.
_METHODS = frozenset(
    {
        "compute_3d_position_ids", "forward", "get_image_features", "get_input_embeddings", "get_placeholder_mask",
        "get_rope_index", "get_video_features",
    }
)  # fmt: skip
# By the names under which transformers and this library's plain path know them.
_ATTENTIONS = ("eager", "sdpa", "flash_attention", "sparsevlm_")
_STOCK = ("transformers.", "torch.nn.", f"{__name__.partition('.')[0]}.")
_HALF = (torch.float16, torch.bfloat16)


def refuses_generation(model_kwargs: Mapping[str, Any], generation_config: Any) -> str | None:
    """Why a call of ``generate`` is not for the engine, by its options."""
    cache = cache_of(model_kwargs)
    reasons = {
        "an assistant model": bool(getattr(generation_config, "is_assistant", False)),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "no cache": not model_kwargs.get("use_cache", True) or cache is None,
        "output_attentions": bool(generation_config.output_attentions),
        "output_hidden_states": bool(generation_config.output_hidden_states),
        "a cache that is handed out (return_dict_in_generate)": bool(generation_config.return_dict_in_generate),
        "a cache of the user's": bool(getattr(cache, "_is_user_defined", False)),
        f"a {type(cache).__name__}": cache is not None and type(cache) is not DynamicCache,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def refuses_patches(view: ModelView) -> str | None:
    """Why a model is not for the engine: what somebody has put in the place of what it would not call."""
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "hooks on all modules"
    for module in (view.model, view.base_model, view.text_model):
        if patched := _METHODS & vars(module).keys():
            return f"{type(module).__name__}.{min(patched)} was replaced"
    layer: Any = view.layers[0]
    tower: Any = view.vision_tower
    for module in (layer, layer.self_attn, layer.mlp, layer.input_layernorm, tower, tower.blocks[0]):
        if not _is_stock(type(module).forward):
            return f"{type(module).__name__}.forward was replaced"
    for module in (view.text_model, tower):
        name = module.config._attn_implementation or "eager"
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        if not name.startswith(_ATTENTIONS) or (function is not None and not _is_stock(function)):
            return f"attention {name!r}"
    return None


def refuses_decoder(view: ModelView) -> str | None:
    """Why a decoder is not for the engine; holds until its modules or weights change."""
    if (reason := _misplaced(view.text_model)) is not None:
        return reason
    layers: Any = view.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (layer, attention, mlp, layer.input_layernorm, layer.post_attention_layernorm)
        linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        reason = _foreign(parts, (*linear, mlp.gate_proj, mlp.up_proj, mlp.down_proj)) or _no_silu(mlp)
        if reason is not None:
            return reason
    return None


def refuses_tower(view: ModelView) -> str | None:
    """Why a vision tower is not for the engine, likewise."""
    tower: Any = view.vision_tower
    if (reason := _misplaced(tower)) is not None:
        return reason
    for block in tower.blocks:
        parts = (block, block.attn, block.mlp, block.norm1, block.norm2)
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
        is_gated = hasattr(block.mlp, "gate_proj")
        if (reason := _foreign(parts, linear) or (_no_silu(block.mlp) if is_gated else None)) is not None:
            return reason
    return None


def _misplaced(module: nn.Module) -> str | None:
    """Weights where, or in what, the kernels do not take them."""
    weights = list(module.parameters())
    if len({weight.device for weight in weights}) > 1:
        return "weights on several devices"
    if not weights[0].is_cuda:
        return None
    if weights[0].dtype not in _HALF:
        return f"weights in {str(weights[0].dtype).removeprefix('torch.')} on a GPU"
    return trouble()


def _foreign(parts: Iterable[nn.Module], linear: Iterable[nn.Module]) -> str | None:
    """A module that is not transformers' own, whose work the engine would not do."""
    for module in parts:
        if not type(module).__module__.startswith(_STOCK):
            return f"a {type(module).__name__}"
    for module in linear:
        if type(module) is not nn.Linear:  # an adapter can be switched, a graph of it cannot
            return f"a {type(module).__name__} in the place of a linear layer"
    return None


def _no_silu(mlp: Any) -> str | None:
    activation = mlp.act_fn
    if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
        return None
    return f"activation {type(activation).__name__}"


def _is_stock(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_STOCK)


def refuses_request(request: Request) -> str | None:
    """Why a request is not for the engine."""
    if missing := sorted(request.traits.needs & NOT_PROVIDED):
        return f"selector {request.traits.name!r} needs {', '.join(missing)}"
    if request.past_len:
        return "a cache that is not empty"
    return None
