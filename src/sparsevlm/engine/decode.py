"""New tokens, one per sample and step, over ragged caches. Every step does the same work on the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.decode_attention import RaggedCache, decode_attention
from ..runtime.view import ModelView
from .layer import run_layer
from .prefill import LayerCache


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


def decode_step(view: ModelView, state: DecodeState, hidden: Tensor, position_ids: Tensor) -> Tensor:
    """Run one token of every sample through the decoder.

    Parameters
    ----------
    view : ModelView
    state : DecodeState
        Moved on by one token; it must have room.
    hidden : Tensor of shape (batch, hidden_size)
        Embeddings of the tokens.
    position_ids : Tensor of shape (3, batch, 1), int64

    Returns
    -------
    Tensor of shape (batch, hidden_size)
        Normed.
    """
    cos, sin = view.text_model.rotary_emb(hidden[:, None], position_ids)
    slot = state.n_new.long()
    state.n_new.add_(1)
    for layer_idx, layer in enumerate(view.layers):
        cache, longest = state.caches[layer_idx], state.longest[layer_idx]
        scaling = view.attentions[layer_idx].scaling

        def attend(
            query: Tensor, key: Tensor, value: Tensor, cache: RaggedCache = cache, longest: int = longest,
            scaling: float = scaling,
        ) -> Tensor:  # fmt: skip
            cache.new_keys.index_copy_(1, slot, key[:, None])
            cache.new_values.index_copy_(1, slot, value[:, None])
            return decode_attention(query, cache, scaling, longest)

        hidden = run_layer(layer, hidden, cos[:, 0], sin[:, 0], attend)
    return view.text_model.norm(hidden)
