"""Attention of one new token per sample over a cache of unequal lengths.

A layer's cache has two parts: what the prompt left there, packed over the samples without padding, and the tokens made
since, one row per sample. Neither is copied when a token comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .choice import takes_triton


@dataclass(frozen=True)
class RaggedCache:
    """Keys and values of one layer.

    Attributes
    ----------
    prompt_keys, prompt_values : Tensor of shape (n_rows, kv_heads, head_dim)
        Sample b has the rows ``offsets[b]`` to ``offsets[b + 1]``; rows behind the last are not read.
    offsets : Tensor of shape (batch + 1,), int32
    new_keys, new_values : Tensor of shape (batch, room, kv_heads, head_dim)
    n_new : Tensor of shape (1,), int32
        How many of ``room`` are filled; on the device, so that a captured graph serves every step.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    offsets: Tensor
    new_keys: Tensor
    new_values: Tensor
    n_new: Tensor


def decode_attention(query: Tensor, cache: RaggedCache, scaling: float, max_prompt: int) -> Tensor:
    """Softmax attention over both parts of the cache.

    Parameters
    ----------
    query : Tensor of shape (batch, heads, head_dim)
        Query head h reads key head ``h // (heads / kv_heads)``.
    cache : RaggedCache
    scaling : float
    max_prompt : int
        No sample has more rows in the packed part.

    Returns
    -------
    Tensor of shape (batch, heads, head_dim)
        In the dtype of ``query``; scores and sums in float32.
    """
    if takes_triton(query):
        from .triton.decode_attention import decode_attention as twin

        return twin(query, cache, scaling, max_prompt)
    return decode_attention_plain(query, cache, scaling)


def decode_attention_plain(query: Tensor, cache: RaggedCache, scaling: float) -> Tensor:
    """The truth: sample by sample."""
    groups = query.shape[1] // cache.prompt_keys.shape[1]
    n_new, offsets, out = int(cache.n_new), cache.offsets.tolist(), []
    for b in range(query.shape[0]):
        rows = slice(offsets[b], offsets[b + 1])
        key = torch.cat([cache.prompt_keys[rows], cache.new_keys[b, :n_new]]).repeat_interleave(groups, dim=1)
        value = torch.cat([cache.prompt_values[rows], cache.new_values[b, :n_new]]).repeat_interleave(groups, dim=1)
        scores = torch.einsum("hd,nhd->hn", query[b].float(), key.float()) * scaling
        out.append(torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), value.float()).to(query.dtype))
    return torch.stack(out)
