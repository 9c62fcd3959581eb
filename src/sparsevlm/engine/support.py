"""Checks of the engine's limits, with the reason that the report gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..compat import GenerationSettings, cache_of, samples_or_greedy, tensor_parallel_group
from ..kernels.dispatch import triton_problem
from ..models import SLIDING, ModelAdapter
from ..request.kv_cache import PrunedDynamicLayer
from ..request.request import Request
from ..selection.context import VISION_NEEDS

_UNSUITED = "no greedy or sampling call of generate"
# Methods that the engine calls none of, or goes past.
_METHODS = frozenset(
    {
        "_prefill", "_sample", "_update_model_kwargs_for_generation", "compute_3d_position_ids", "forward",
        "get_image_features", "get_input_embeddings", "get_placeholder_mask", "get_rope_index", "get_video_features",
        "get_vision_position_ids", "prepare_inputs_for_generation",
    }
)  # fmt: skip
# By the names under which transformers and this library's plain path know them.
_ATTENTIONS = ("eager", "sdpa", "flash_attention", "sparsevlm_")
_STOCK = ("transformers.", "torch.nn.", f"{__name__.partition('.')[0]}.")
_QUANTIZED = "transformers.integrations."  # where transformers has linear layers of other methods
_HALF = (torch.float16, torch.bfloat16)


def unsupported_arguments(
    arguments: Mapping[str, Any], settings: GenerationSettings, modes: Mapping[str, Any]
) -> str | None:
    """Why a call of ``generate`` is not for the engine, by what it is given.

    Parameters
    ----------
    arguments : mapping
    settings : GenerationSettings
    modes : mapping
        From :func:`~sparsevlm.compat.split_mode_arguments`.
    """
    cache, implementation = cache_of(arguments), settings["cache_implementation"]
    reasons = {
        "an assistant model": modes.get("assistant_model") is not None or bool(settings["is_assistant"]),
        "inputs_embeds": arguments.get("inputs_embeds") is not None,
        "no input_ids": not isinstance(arguments.get("input_ids", arguments.get("inputs")), Tensor),
        "both inputs and input_ids": arguments.get("input_ids") is not None and arguments.get("inputs") is not None,
        "no cache": settings["use_cache"] is False,
        "output_attentions": bool(settings["output_attentions"]),
        "output_hidden_states": bool(settings["output_hidden_states"]),
        f"cache_implementation={implementation!r}": implementation not in (None, "dynamic"),
        _UNSUITED: (settings["num_beams"] or 1) > 1 or settings["prompt_lookup_num_tokens"] is not None,
        "generating in step on several devices (synced_gpus)": bool(modes.get("synced_gpus")),
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    return reason or (None if cache is None else unsupported_cache(cache))


def unsupported_call(
    adapter: ModelAdapter, prepared: Mapping[str, Any], generation_config: Any, modes: Mapping[str, Any]
) -> str | None:
    """Why a call is not for the engine, by what transformers has made of it."""
    most = adapter.decoder.most_positions
    if most is not None and generation_config.max_length > most:
        return f"more than the {most} positions up to which rotary positions of type 'dynamic' are the default ones"
    if not samples_or_greedy(generation_config, modes) or generation_config.prefill_chunk_size is not None:
        return _UNSUITED
    return unsupported_cache(cache_of(prepared))


def unsupported_cache(cache: Any) -> str | None:
    """Why what a request leaves cannot be put into a cache."""
    if type(cache) is not DynamicCache:
        return f"a {type(cache).__name__}"
    if cache.offloading:
        return "an offloaded cache"
    if kinds := {type(layer) for layer in cache.layers} - {DynamicLayer, PrunedDynamicLayer}:
        return f"a cache with {min(kind.__name__ for kind in kinds)}"
    return None


def unsupported_mode(adapter: ModelAdapter) -> str | None:
    """Why nothing runs on the engine as torch and the model are at present."""
    if adapter.decoder.block is None:
        return _undescribed(adapter)
    if SLIDING in adapter.decoder.layer_types:
        return "decoder layers with a sliding window"
    if tensor_parallel_group(adapter.model) is not None:
        return "a tensor-parallel model: nothing of the engine waits for other ranks"
    device = adapter.decoder.embed.weight.device
    if device.type == "meta":
        return "offloaded weights"
    if torch.is_autocast_enabled(device.type):
        return "autocast"
    return "training mode" if adapter.decoder.module.training else unsupported_patches(adapter)


def unsupported_patches(adapter: ModelAdapter) -> str | None:
    """Why a model is not for the engine: what somebody has put in the place of what it would not call."""
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return "hooks on all modules"
    for module in (adapter.model, adapter.base_model, adapter.decoder.module):
        if patched := _METHODS & vars(module).keys():
            return f"{type(module).__name__}.{min(patched)} was replaced"
    for name in _METHODS:
        if not _is_stock(getattr(type(adapter.model), name, None) or _is_stock):
            return f"{type(adapter.model).__name__}.{name} was replaced"
    # A tower without a program runs by its own modules, whatever attention they take.
    for module in (adapter.decoder.module, *[adapter.vision.module] * (adapter.vision.program is not None)):
        name = attention_of(module)
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        if not name.startswith(_ATTENTIONS) or (function is not None and not _is_stock(function)):
            return f"attention {name!r}"
    return None


def unsupported_decoder(adapter: ModelAdapter) -> str | None:
    """Why a decoder is not for the engine; holds until its modules or weights change."""
    decoder = adapter.decoder
    if decoder.block is None:
        return _undescribed(adapter)
    if (reason := _misplaced(decoder.module)) is not None:
        return reason
    for layer in decoder.layers:
        block = decoder.block.modules_of(layer)
        parts = [layer, block.attention, block.mlp, block.attention_norm, block.mlp_norm]
        parts += [norm for norm in (block.query_norm, block.key_norm) if norm is not None]
        linear = (block.query, block.key, block.value, block.output, block.gate, block.up, block.down)
        if (reason := _foreign(parts, linear) or _no_silu(block.activation)) is not None:
            return reason + _quantization(adapter.model)
    return None


def _quantization(model: Any) -> str:
    """What to know of a checkpoint that came quantized."""
    method = getattr(model, "quantization_method", None)
    if method is None:
        return ""
    return (
        f" (quantized by {getattr(method, 'value', method)}; the engine runs weights in bfloat16 or float16, and makes "
        "float8 copies of such by weights='fp8')"
    )


def unsupported_classes(kinds: Iterable[type]) -> str | None:
    """Why modules of some classes are not for the engine: what was put in the place of their ``forward``."""
    patched = (kind.__name__ for kind in kinds if not _is_stock(getattr(kind, "forward", None)))
    return next((f"{name}.forward was replaced" for name in patched), None)


def _undescribed(adapter: ModelAdapter) -> str:
    return adapter.decoder.undescribed or f"the decoder layers of {adapter.name}, which are not described"


def unsupported_tower(adapter: ModelAdapter) -> str | None:
    """Why a vision tower is not for the engine, likewise."""
    vision = adapter.vision
    if vision.program is None:
        return f"the vision tower of a {adapter.name}"
    if (reason := _misplaced(vision.module)) is not None:
        return reason
    for block in vision.program.blocks:
        linear = [module for module in block.module.modules() if isinstance(module, nn.Linear)]
        gated = None if block.gate is None else _no_silu(block.mlp.act_fn)
        if (reason := _foreign(block.module.modules(), linear) or gated) is not None:
            return reason
    for merger in (vision.program.merger, *dict(vision.program.late_mergers).values()):
        if (reason := _foreign_within(merger)) is not None:
            return reason
    return None


def unsupported_capture(adapter: ModelAdapter) -> str | None:
    """Why the modules of a tower cannot be recorded as they are, likewise."""
    vision, device = adapter.vision, adapter.decoder.embed.weight.device
    if not vision.captured:
        return f"the vision tower of a {adapter.name}, which is not described"
    for part in vision.captured:
        if len({weight.device for weight in part.module.parameters()} | {device}) > 1:
            return "a tower on another device"
        if (reason := _foreign_within(part.module)) is not None:
            return reason
    return None


def unsupported_captured_mode(tower: nn.Module, modules: Iterable[nn.Module]) -> str | None:
    """Why modules of a tower cannot be recorded, or what was recorded replayed, as they are at present."""
    name = attention_of(tower)
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if not name.startswith(_ATTENTIONS[:-1]) or (function is not None and not _is_stock(function)):
        return f"attention {name!r}"
    if any(module.training for module in modules):
        return "training mode"
    if any(vars(module).get("_compiled_call_impl") is not None for module in modules):
        return "compiled modules"
    return unsupported_classes(set(map(type, modules)))


def attention_of(module: Any) -> str:
    """Name of the attention function of a part of a model."""
    return module.config._attn_implementation or "eager"


def _misplaced(module: nn.Module) -> str | None:
    """Weights where, or in what, the kernels do not take them."""
    weights = list(module.parameters())
    if len({weight.device for weight in weights}) > 1:
        return "weights on several devices"
    if not weights[0].is_cuda:
        return None
    if weights[0].dtype not in _HALF:
        return f"weights in {str(weights[0].dtype).removeprefix('torch.')} on a GPU"
    return triton_problem()


def _foreign(parts: Iterable[nn.Module], linear: Iterable[nn.Module]) -> str | None:
    """A module that is not transformers' own, whose work the engine would not do."""
    for module in parts:
        if not type(module).__module__.startswith(_STOCK) or type(module).__module__.startswith(_QUANTIZED):
            return f"a {type(module).__name__}"
    for module in linear:
        if type(module) is not nn.Linear:  # an adapter can be switched, a graph of it cannot
            return f"a {type(module).__name__} in the place of a linear layer"
        if "forward" in vars(module) or type(module._parameters) is not dict:
            return f"a {type(module).__name__} whose forward was replaced"
        for weight in module.parameters():
            if type(weight.data) is not Tensor:
                return f"a {type(weight.data).__name__} in the place of a weight"
    return None


def _foreign_within(module: nn.Module) -> str | None:
    """The same of all parts of a module."""
    modules = list(module.modules())
    return _foreign(modules, (part for part in modules if isinstance(part, nn.Linear)))


def _no_silu(activation: Any) -> str | None:
    if isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation":
        return None
    return f"activation {type(activation).__name__}"


def _is_stock(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith(_STOCK)


def unsupported_request(request: Request) -> str | None:
    """Why a request is not for the engine."""
    if request.config.vision_keep < 1.0 and (read := sorted(request.traits.needs & VISION_NEEDS)):
        return f"selector {request.traits.name!r} needs {', '.join(read)} of all patches, vision_keep computes some"
    if any(int(sample.last) != request.q_len - 1 for sample in request.samples):
        return "a prompt whose last token is masked"
    return None
