"""Estimated FLOPs of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..models import RECURRENT, SLIDING, ModelAdapter


def prefill_flops(adapter: ModelAdapter, tokens_per_layer: Sequence[int], past_len: int, n_last: int = 0) -> float:
    """FLOPs of the decoder layers over one sample's prefill.

    Two per weight and token in the projections and the MLP (of experts, those that compute a token), ``4 · heads ·
    head_dim`` per pair of query and visible key in attention, of which a sliding window holds no more than its length;
    norms, rotary and the head are left out. A recurrent layer takes six per token and number of its state: to forget,
    to read, to write. Images whose tokens see each other both ways count as causal.

    Parameters
    ----------
    adapter : ModelAdapter
    tokens_per_layer : sequence of int
        Tokens of the sample that each layer computes.
    past_len : int
        Tokens cached before (taken as dense).
    n_last : int
        Tokens at the end that layers without keys of their own compute; 0: all.
    """
    total, decoder = 0.0, adapter.decoder
    config = decoder.module.config
    for i, tokens in enumerate(tokens_per_layer):
        kind, weights = decoder.layer_types[i], _weights_per_token(decoder.layers[i], decoder.experts_per_token)
        computed = min(tokens, n_last) if n_last and i >= decoder.first_shared else tokens
        before = past_len + tokens - computed
        pairs = _visible_pairs(computed, before, config.sliding_window if kind == SLIDING else past_len + tokens)
        width = config.num_attention_heads * _head_dim(decoder.attentions[i], config)
        total += 2.0 * weights * computed
        total += 6.0 * decoder.state_size * tokens if kind == RECURRENT else 4.0 * width * pairs
    return total


def kv_numbers(adapter: ModelAdapter) -> list[int]:
    """Numbers in the keys and values that each layer reads of one token, its own or those of an earlier layer; 0 of a
    recurrent layer."""
    config, attentions = adapter.decoder.module.config, adapter.decoder.attentions
    return [0 if one is None else 2 * _kv_heads(one, config) * _head_dim(one, config) for one in attentions]


def _kv_heads(attention: Any, config: Any) -> int:
    """Of a layer's own, which may be fewer in some layers than in others."""
    per_head = getattr(attention, "num_key_value_groups", None)
    return int(config.num_attention_heads // per_head if per_head else config.num_key_value_heads)


def _head_dim(attention: Any, config: Any) -> int:
    """Of a layer's own heads, which may be larger in some layers than in others."""
    own = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _visible_pairs(tokens: int, past_len: int, window: int) -> float:
    """Pairs of a query and a key that it sees: itself and those before it, ``window`` at most."""
    n_growing = min(tokens, max(0, window - past_len))  # queries whose window holds everything before them
    return n_growing * past_len + n_growing * (n_growing + 1) / 2 + (tokens - n_growing) * window


def _weights_per_token(layer: nn.Module, experts_per_token: int) -> int:
    """Weights of a layer that each token is multiplied with.

    Experts are parameters of shape (n_experts, out, in), and so is, of shape (n_experts, in), what chooses them.
    """
    weights = 0
    for module in layer.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            weights += module.weight.numel()
            continue
        for own in module.parameters(recurse=False) if experts_per_token else ():
            if own.ndim == 2:
                weights += own.numel()
            elif own.ndim == 3:
                weights += own[0].numel() * experts_per_token
    return weights
