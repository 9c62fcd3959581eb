"""Estimated FLOPs of a request."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..models import ModelAdapter


def prefill_flops(adapter: ModelAdapter, tokens_per_layer: Sequence[int], past_len: int) -> float:
    """FLOPs of the decoder layers over one sample's prefill.

    Two per weight and token in the projections and the MLP (of experts, those that compute a token), ``4 · heads ·
    head_dim`` per pair of query and visible key in attention; norms, rotary and the head are left out.

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
        weights = _weights_per_token(layer, adapter.decoder.experts_per_token)
        pairs = tokens * past_len + tokens * (tokens + 1) / 2
        total += 2.0 * weights * tokens + 4.0 * width * pairs
    return total


def _weights_per_token(layer: nn.Module, experts_per_token: int) -> int:
    """Weights of a layer that each token is multiplied with.

    Experts are parameters of shape (n_experts, out, in), and so is, of shape (n_experts, in), what chooses them.
    """
    weights = 0
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            weights += module.weight.numel()
            continue
        for own in module.parameters(recurse=False) if experts_per_token else ():
            if own.ndim == 2:
                weights += own.numel()
            elif own.ndim == 3:
                weights += own[0].numel() * experts_per_token
    return weights
