"""The prompt of every sample, packed: what padding there was is not computed, and what was dropped neither."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import varlen_attention
from ...kernels.elementwise import rotate
from ...models import ModelAdapter
from ...request.request import Request
from ...request.step import Readout, choose_embedding_raters, prune_step
from ..fused_weights import FusedWeights
from .layer import Attend, run_layer, summed
from .readout import read


@dataclass
class Packed:
    """Rows of all samples, one sample behind the other.

    Attributes
    ----------
    hidden : Tensor of shape (n_rows, hidden_size)
    cos, sin : Tensor of shape (n_rows, head_dim)
    positions : list of Tensor
        Per sample, the position within the padded sequence of each of its rows, ascending.
    cu_seqlens : Tensor of shape (batch + 1,), int32
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    positions: list[Tensor]
    cu_seqlens: Tensor

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sample."""
        return max(rows.shape[0] for rows in self.positions)

    def local(self, sample_idx: int, positions: Tensor) -> Tensor:
        """Packed rows of tokens of one sample."""
        before = sum(rows.shape[0] for rows in self.positions[:sample_idx])
        return before + torch.searchsorted(self.positions[sample_idx], positions)


@dataclass(frozen=True)
class LayerCache:
    """Keys and values that a layer computed for the prompt, of shape (n_rows, kv_heads, head_dim), packed."""

    keys: Tensor
    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def pack(adapter: ModelAdapter, request: Request, embeds: Tensor, position_ids: Tensor) -> Packed:
    """Leave out the padding.

    Parameters
    ----------
    adapter : ModelAdapter
    request : Request
        Its samples are on the device of ``embeds``.
    embeds : Tensor of shape (batch, q_len, hidden_size)
        Visual features in their places.
    position_ids : Tensor of shape (3, batch, q_len)
    """
    positions = [sample.all_positions for sample in request.samples]
    q_len = embeds.shape[1]
    rows = torch.cat([b * q_len + own for b, own in enumerate(positions)])
    hidden = embeds.flatten(0, 1)[rows]
    cos, sin = adapter.decoder.rotary(hidden[None], position_ids.flatten(1)[:, None, rows])
    return Packed(hidden, cos[0], sin[0], positions, _offsets(positions))


def prefill(
    adapter: ModelAdapter, weights: FusedWeights, request: Request, packed: Packed
) -> tuple[Tensor, list[LayerCache]]:
    """Run the decoder over the prompt and drop tokens behind the target layers.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    request : Request
        Its samples and records are brought up to date, as on the plain path.
    packed : Packed
        Changed in place.

    Returns
    -------
    hidden : Tensor of shape (batch, hidden_size)
        Normed, of every sample's last row.
    caches : list of LayerCache
    """
    caches: list[LayerCache] = []
    choose_embedding_raters(request, lambda b, tokens: packed.hidden[packed.local(b, tokens)])
    if -1 in request.target_layers:
        _prune(request, packed, -1, Readout())
    residual: Tensor | None = None
    for layer_idx, block in enumerate(weights.blocks):
        for sample in request.samples:
            sample.enter_layer()
        reads: list[Readout] = []
        target = None
        if layer_idx in request.target_layers:
            target = layer_idx
            packed.hidden, residual = summed(packed.hidden, residual), None
        attend = _attention(request, packed, caches, block.scaling, target, reads)
        packed.hidden, residual = run_layer(block, weights, packed.hidden, residual, attend)
        if target is not None:
            packed.hidden, residual = summed(packed.hidden, residual), None
            _prune(request, packed, target, reads[0])
    last = summed(packed.hidden, residual)[packed.cu_seqlens[1:].long() - 1]
    return adapter.decoder.norm(last), caches


def _attention(
    request: Request, packed: Packed, caches: list[LayerCache], scaling: float, target: int | None, reads: list[Readout]
) -> Attend:
    """Attention of a layer, which keeps keys and values; a ``target`` is read on the way, into ``reads``."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = rotate(query, key, packed.cos, packed.sin)
        caches.append(LayerCache(key, value.contiguous(), packed.cu_seqlens, packed.max_seqlen))
        if target is not None:
            reads.append(read(request, packed, target, query, key, scaling))
        return varlen_attention(query, key, value, packed.cu_seqlens, packed.max_seqlen, scaling, causal=True)

    return attend


def _prune(request: Request, packed: Packed, target: int, readout: Readout) -> None:
    """Decide for every sample what goes on, and gather it."""
    visual = [packed.local(b, sample.positions) for b, sample in enumerate(request.samples)]
    survivors = prune_step(request, target, lambda b: packed.hidden[visual[b]], readout)
    if survivors is None:
        return
    for b, kept in enumerate(survivors):
        if kept.merges:
            packed.hidden[packed.local(b, kept.after)] = kept.merged(packed.hidden[visual[b]])
    positions = [sample.all_positions for sample in request.samples]
    rows = torch.cat([packed.local(b, own) for b, own in enumerate(positions)])
    packed.hidden, packed.cos, packed.sin = packed.hidden[rows], packed.cos[rows], packed.sin[rows]
    packed.positions, packed.cu_seqlens = positions, _offsets(positions)


def _offsets(positions: list[Tensor]) -> Tensor:
    sizes = [0, *(rows.shape[0] for rows in positions)]
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(positions[0].device)
