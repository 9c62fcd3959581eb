"""New tokens, one per sample and step, over ragged caches. Every step does the same work on the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.decode_attention import RaggedCache, decode_attention
from ..kernels.rotary import rotate_into
from ..models import ModelAdapter
from .layer import run_layer, summed
from .prefill import LayerCache
from .weights import Weights


@dataclass(frozen=True)
class DecodeState:
    """What a step reads and writes.

    Attributes
    ----------
    caches : list of RaggedCache
        One per layer; they share ``n_new``.
    longest : list of int
        Rows of the longest prompt, by layer.
    n_new : Tensor of shape (1,), int32
        Tokens made so far.
    """

    caches: list[RaggedCache]
    longest: list[int]
    n_new: Tensor


def begin_decode(prompt: Sequence[LayerCache], batch: int, room: int) -> DecodeState:
    """Make room for new tokens beside the caches of the prompt.

    Parameters
    ----------
    prompt : sequence of LayerCache
    batch : int
    room : int
        Most tokens that will come.
    """
    n_new = torch.zeros(1, dtype=torch.int32, device=prompt[0].keys.device)
    caches = []
    for layer in prompt:
        shape = (batch, room, *layer.keys.shape[1:])
        new_keys, new_values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
        caches.append(RaggedCache(layer.keys, layer.values, layer.offsets, new_keys, new_values, n_new))
    return DecodeState(caches, [layer.longest for layer in prompt], n_new)


def decode_step(adapter: ModelAdapter, weights: Weights, state: DecodeState, tokens: Tensor, first: Tensor) -> Tensor:
    """Run one token of every sample through the model.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : Weights
    state : DecodeState
        Moved on by one token; it must have room.
    tokens : Tensor of shape (batch,), int64
    first : Tensor of shape (3, batch), int64
        Positions of the first new token of every sample; those of the next follow.

    Returns
    -------
    Tensor of shape (batch, vocab_size)
        Logits of the next token.
    """
    hidden = adapter.decoder.embed(tokens)
    slot = state.n_new.clone()
    cos, sin = adapter.decoder.rotary(hidden[:, None], (first + slot)[:, :, None])
    cos, sin = cos[:, 0], sin[:, 0]
    state.n_new.add_(1)
    addend: Tensor | None = None
    for layer_idx, block in enumerate(weights.blocks):
        cache, longest = state.caches[layer_idx], state.longest[layer_idx]

        def attend(
            query: Tensor, key: Tensor, value: Tensor, cache: RaggedCache = cache, longest: int = longest,
            scaling: float = block.scaling,
        ) -> Tensor:  # fmt: skip
            query = rotate_into(query, key, value, cos, sin, cache.new_keys, cache.new_values, slot)
            return decode_attention(query, cache, scaling, longest)

        hidden, addend = run_layer(block, weights, hidden, addend, attend)
    logits: Tensor = adapter.decoder.head(adapter.decoder.norm(summed(hidden, addend)))
    return logits
