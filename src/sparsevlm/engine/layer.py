"""One decoder layer over packed rows, from the weights of the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels.activation import swiglu
from ..kernels.norm import rms_norm
from .weights import Weights

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_layer(
    layer: Any, weights: Weights, hidden: Tensor, addend: Tensor | None, attend: Attend
) -> tuple[Tensor, Tensor]:
    """One layer's output, in two parts that are still to be added: the next norm does that on its way.

    Parameters
    ----------
    layer : nn.Module
        Of a Qwen2 decoder.
    weights : Weights
    hidden : Tensor of shape (n_rows, hidden_size)
    addend : Tensor of shape (n_rows, hidden_size), optional
        Second part of the input.
    attend : callable
        ``attend(query, key, value)`` with projections of shape (n_rows, heads, head_dim) rotates queries and keys and
        gives the mixed values of shape (n_rows, heads, head_dim); it also keeps keys and values, if they are needed
        again.

    Returns
    -------
    hidden, addend : Tensor of shape (n_rows, hidden_size)
    """
    attention, mlp = layer.self_attn, layer.mlp
    norm = layer.input_layernorm
    normed, hidden = rms_norm(hidden, norm.weight, norm.variance_epsilon, residual=addend)
    n_rows = hidden.shape[0]
    joined = weights.of(attention)
    projected = (
        joined(normed) if joined else [p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
    )
    query, key, value = (rows.unflatten(-1, (-1, attention.head_dim)) for rows in projected)
    mixed = attention.o_proj(attend(query, key, value).reshape(n_rows, -1))
    norm = layer.post_attention_layernorm
    normed, hidden = rms_norm(mixed, norm.weight, norm.variance_epsilon, residual=hidden)
    joined = weights.of(mlp)
    gate, up = joined(normed) if joined else (mlp.gate_proj(normed), mlp.up_proj(normed))
    return hidden, mlp.down_proj(swiglu(gate, up))


def summed(hidden: Tensor, addend: Tensor | None) -> Tensor:
    """Both parts of a layer's output."""
    return hidden if addend is None else hidden + addend
