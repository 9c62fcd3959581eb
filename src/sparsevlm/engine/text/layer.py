"""One decoder layer over packed rows, from the weights of the model's own modules."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ...kernels.elementwise import rms_norm, swiglu
from ...models.base import BlockModules
from ..fused_weights import FusedWeights

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run_layer(
    block: BlockModules, weights: FusedWeights, hidden: Tensor, residual: Tensor | None, attend: Attend
) -> tuple[Tensor, Tensor]:
    """One layer's output, in two parts that are still to be added: the next norm does that on its way.

    Parameters
    ----------
    block : BlockModules
    weights : FusedWeights
    hidden : Tensor of shape (n_rows, hidden_size)
    residual : Tensor of shape (n_rows, hidden_size), optional
        Second part of the input.
    attend : callable
        ``attend(query, key, value)`` with projections of shape (n_rows, heads, head_dim) rotates queries and keys and
        gives the mixed values of shape (n_rows, heads, head_dim); it also keeps keys and values, if they are needed
        again.

    Returns
    -------
    hidden, residual : Tensor of shape (n_rows, hidden_size)
    """
    norm = block.attention_norm
    normed, hidden = rms_norm(hidden, norm.weight, norm.variance_epsilon, residual=residual)
    n_rows = hidden.shape[0]
    fused = weights.of(block.attention)
    projected = fused(normed) if fused else [p(normed) for p in (block.query, block.key, block.value)]
    query, key, value = (rows.unflatten(-1, (-1, block.head_dim)) for rows in projected)
    mixed = block.output(attend(query, key, value).reshape(n_rows, -1))
    norm = block.mlp_norm
    normed, hidden = rms_norm(mixed, norm.weight, norm.variance_epsilon, residual=hidden)
    fused = weights.of(block.mlp)
    gate, up = fused(normed) if fused else (block.gate(normed), block.up(normed))
    return hidden, block.down(swiglu(gate, up))


def summed(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Both parts of a layer's output."""
    return hidden if residual is None else hidden + residual
