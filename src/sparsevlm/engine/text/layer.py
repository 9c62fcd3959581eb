"""One decoder layer over packed rows: those of prompts, or a few new tokens, which take as long as weights are read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.elementwise import Norm, rms_norm, swiglu
from ...kernels.skinny_linear import skinny_linear
from ...models.decoder import BlockModules, Decoder
from ..fused_weights import DecodeWeights, FusedWeights

# Elements of gate and up that are there at once: products of fewer rows than that take as long for each.
_MOST_HELD = 1 << 28

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
        ``attend(query, key, value)`` with projections of shape (n_rows, heads, head_dim) norms heads, where the block
        does (:func:`head_norms`), rotates queries and keys and gives the mixed values of shape (n_rows, heads,
        head_dim); it also keeps keys and values, if they are needed again.

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

    def mlp(rows: Tensor) -> Tensor:
        gate, up = fused(rows) if fused else (block.gate(rows), block.up(rows))
        out: Tensor = block.down(swiglu(gate, up))
        return out

    return hidden, in_parts(mlp, normed, 2 * block.gate.weight.shape[0])


def run_decode_layer(block: BlockModules, weights: DecodeWeights, hidden: Tensor, attend: Attend) -> Tensor:
    """One layer's output for a few rows: norms, SwiGLU and sums are a part of the products that they stand beside.

    Parameters
    ----------
    block : BlockModules
    weights : DecodeWeights
    hidden : Tensor of shape (n_rows, hidden_size)
        At most :data:`~sparsevlm.kernels.skinny_linear.MOST_ROWS` rows.
    attend : callable
        As in :func:`run_layer`.

    Returns
    -------
    Tensor of shape (n_rows, hidden_size)
    """
    linears = (block.query, block.key, block.value)
    norm = Norm(block.attention_norm.weight, block.attention_norm.variance_epsilon)
    projected = [skinny_linear(hidden, one, norm) for one in weights.products(block.attention, linears)]
    if len(projected) == 1:
        projected = list(projected[0].split([linear.weight.shape[0] for linear in linears], dim=-1))
    query, key, value = (rows.unflatten(-1, (-1, block.head_dim)) for rows in projected)
    (output,), (down,) = (weights.products(linear, [linear]) for linear in (block.output, block.down))
    hidden = skinny_linear(attend(query, key, value).flatten(1), output, residual=hidden)
    norm = Norm(block.mlp_norm.weight, block.mlp_norm.variance_epsilon)
    products = weights.products(block.mlp, (block.gate, block.up))
    if len(products) == 1:
        activated = skinny_linear(hidden, products[0], norm, gated=True)
    else:
        activated = swiglu(*(skinny_linear(hidden, one, norm) for one in products))
    return skinny_linear(activated, down, residual=hidden)


def head_norms(block: BlockModules) -> tuple[Norm, Norm] | None:
    """Norms of every head of queries and of keys, where there are such."""
    if block.query_norm is None:
        return None
    query, key = (Norm(one.weight, one.variance_epsilon) for one in (block.query_norm, block.key_norm))
    return query, key


def rotary_tables(decoder: Decoder, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions.

    Parameters
    ----------
    decoder : Decoder
    like : Tensor
        With the device and dtype of the tables.
    positions : Tensor of shape (n_position_axes, n), int64

    Returns
    -------
    cos, sin : Tensor of shape (n, head_dim)
    """
    rotary = decoder.rotary
    if decoder.most_positions is not None:  # the module itself would look at the positions, and wait for them
        angles = positions[0, :, None].float() * rotary.original_inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = ((table * rotary.attention_scaling).to(like.dtype) for table in (angles.cos(), angles.sin()))
        return cos, sin
    cos, sin = rotary(like, positions if decoder.n_position_axes == 1 else positions[:, None])
    return cos[0], sin[0]


def in_parts(run: Callable[[Tensor], Tensor], rows: Tensor, width: int) -> Tensor:
    """``run(rows)``, of the same shape, part by part where what it holds for all rows would take much memory.

    Parameters
    ----------
    run : callable
        Takes each row by itself.
    rows : Tensor of shape (n_rows, size)
    width : int
        Elements that it holds for a row.
    """
    n_parts = -(-rows.shape[0] * width // _MOST_HELD)
    if n_parts <= 1:
        return run(rows)
    out, most = torch.empty_like(rows), -(-rows.shape[0] // (64 * n_parts)) * 64
    for part, given in zip(out.split(most), rows.split(most), strict=True):
        part.copy_(run(given))
    return out


def summed(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Both parts of a layer's output."""
    return hidden if residual is None else hidden + residual
