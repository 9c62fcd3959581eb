"""One decoder layer over packed rows, from the weights of the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..kernels.activation import swiglu
from ..kernels.norm import rms_norm
from ..kernels.rotary import rotate

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
    """One layer's output.

    Parameters
    ----------
    layer : nn.Module
        Of a Qwen2 decoder.
    hidden : Tensor of shape (n_rows, hidden_size)
    cos, sin : Tensor of shape (n_rows, head_dim)
    attend : callable
        ``attend(query, key, value)`` with rotated queries and keys of shape (n_rows, heads, head_dim) gives the mixed
        values of shape (n_rows, heads, head_dim); it also keeps keys and values, if they are needed again.

    Returns
    -------
    Tensor of shape (n_rows, hidden_size)
    """
    attention, mlp = layer.self_attn, layer.mlp
    norm = layer.input_layernorm
    normed, hidden = rms_norm(hidden, norm.weight, norm.variance_epsilon)
    n_rows = hidden.shape[0]
    query, key, value = (
        projection(normed).view(n_rows, -1, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = rotate(query, key, cos, sin)
    mixed = attention.o_proj(attend(query, key, value).reshape(n_rows, -1))
    norm = layer.post_attention_layernorm
    normed, hidden = rms_norm(mixed, norm.weight, norm.variance_epsilon, residual=hidden)
    return hidden + mlp.down_proj(swiglu(mlp.gate_proj(normed), mlp.up_proj(normed)))
