"""Estimated FLOPs and measured cache bytes of a request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..models import ModelAdapter
from .cache import PrunedStaticLayer


def prefill_flops(adapter: ModelAdapter, tokens_per_layer: Sequence[int], past_len: int) -> float:
    """FLOPs of the decoder layers over one sample's prefill.

    Two per weight and token in the projections and the MLP, ``4 · heads · head_dim`` per pair of query and visible
    key in attention; norms, rotary and the head are left out.

    Parameters
    ----------
    adapter : ModelAdapter
    tokens_per_layer : sequence of int
        Tokens of the sample that each layer computes.
    past_len : int
        Tokens cached before (taken as dense).
    """
    total, config = 0.0, adapter.decoder.module.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    for layer, tokens in zip(adapter.decoder.layers, tokens_per_layer, strict=True):
        weights = sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
        pairs = tokens * past_len + tokens * (tokens + 1) / 2
        total += 2.0 * weights * tokens + 4.0 * width * pairs
    return total


def cache_bytes(layers: Iterable[Any], dense_length: int) -> tuple[int, int]:
    """Bytes of keys and values, as they would be dense and as they are.

    Parameters
    ----------
    layers : iterable of cache layers
        After the prefill.
    dense_length : int
        Slots of each layer without pruning (a static layer's buffers count in full both times).
    """
    dense = sparse = 0
    for layer in layers:
        if hasattr(layer, "cache_bytes"):  # keeps its own books
            own = layer.cache_bytes(dense_length)
            dense, sparse = dense + own[0], sparse + own[1]
            continue
        if getattr(layer, "keys", None) is None or layer.keys.ndim != 4:
            continue
        size = sum(states.numel() * states.element_size() for states in (layer.keys, layer.values))
        slots = layer.keys.shape[-2]
        sparse += size
        dense += size if hasattr(layer, "max_cache_len") else size // max(slots, 1) * dense_length
    return dense, sparse


def static_note(layers: Iterable[Any]) -> str | None:
    """Say where dropped tokens' memory is not freed."""
    if any(isinstance(layer, PrunedStaticLayer) for layer in layers):
        return "static cache: buffers keep their full length, dropped tokens free no memory"
    return None
