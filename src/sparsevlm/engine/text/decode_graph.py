"""New tokens, one per sample and step, over ragged caches: the step, and its graph on tensors that stay in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import RaggedCache, decode_attention
from ...kernels.elementwise import rotate_into
from ...models import ModelAdapter
from ..cuda_graphs import GraphPool, LRUCache, round_up
from ..fused_weights import FusedWeights
from .layer import run_layer, summed
from .prefill import LayerCache


@dataclass(frozen=True)
class DecodeState:
    """Buffers that a decode step reads and writes.

    Attributes
    ----------
    caches : list of RaggedCache
        One per layer; they share ``n_new``.
    max_seqlen : list of int
        Rows of the longest prompt, by layer.
    n_new : Tensor of shape (1,), int32
        Tokens made so far.
    """

    caches: list[RaggedCache]
    max_seqlen: list[int]
    n_new: Tensor


def begin_decode(prompt: Sequence[LayerCache], batch: int, capacity: int) -> DecodeState:
    """Make room for new tokens beside the caches of the prompt.

    Parameters
    ----------
    prompt : sequence of LayerCache
    batch : int
    capacity : int
        Most tokens that will come.
    """
    n_new = torch.zeros(1, dtype=torch.int32, device=prompt[0].keys.device)
    caches = []
    for layer in prompt:
        shape = (batch, capacity, *layer.keys.shape[1:])
        new_keys, new_values = layer.keys.new_empty(shape), layer.values.new_empty(shape)
        caches.append(RaggedCache(layer.keys, layer.values, layer.cu_seqlens, new_keys, new_values, n_new))
    return DecodeState(caches, [layer.max_seqlen for layer in prompt], n_new)


def decode_step(
    adapter: ModelAdapter, weights: FusedWeights, state: DecodeState, tokens: Tensor, first: Tensor
) -> Tensor:
    """Run one token of every sample through the model.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
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
    residual: Tensor | None = None
    for layer_idx, block in enumerate(weights.blocks):
        cache, max_seqlen = state.caches[layer_idx], state.max_seqlen[layer_idx]

        def attend(
            query: Tensor, key: Tensor, value: Tensor, cache: RaggedCache = cache, max_seqlen: int = max_seqlen,
            scaling: float = block.scaling,
        ) -> Tensor:  # fmt: skip
            query = rotate_into(query, key, value, cos, sin, cache.new_keys, cache.new_values, slot)
            return decode_attention(query, cache, scaling, max_seqlen)

        hidden, residual = run_layer(block, weights, hidden, residual, attend)
    logits: Tensor = adapter.decoder.head(adapter.decoder.norm(summed(hidden, residual)))
    return logits


# Graphs that are kept; each holds the caches of its bucket.
_MOST_GRAPHS = 4
_LEAST_ROWS = 64
# New tokens that there is room for at first, at most.
_FIRST_CAPACITY = 512


@dataclass(frozen=True)
class CacheShape:
    """Capacities of a decode graph.

    Attributes
    ----------
    batch : int
    rows, max_seqlen : tuple of int
        By layer: rows of all prompts together, and of the longest.
    """

    batch: int
    rows: tuple[int, ...]
    max_seqlen: tuple[int, ...]

    @classmethod
    def of(cls, prompt: Sequence[LayerCache], batch: int) -> CacheShape:
        """The bucket of a request: powers of two, as a step reads no more rows than there are."""
        rows = tuple(_power(layer.keys.shape[0]) for layer in prompt)
        max_seqlen = tuple(_power(layer.max_seqlen) for layer in prompt)
        return cls(batch, rows, max_seqlen)


def _power(n: int) -> int:
    return max(_LEAST_ROWS, 1 << (n - 1).bit_length())


class DecodeGraph:
    """The graph of a decode step over caches that stay in place.

    There is room for as many new tokens as were asked for, up to a number that many answers do not reach; where one
    does, the room is doubled and the step recorded anew. On a CPU there is no graph: the step runs as it is.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    prompt : sequence of LayerCache
        Caches of the prompt.
    batch : int
        Samples.
    """

    def __init__(
        self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool, prompt: Sequence[LayerCache], batch: int
    ) -> None:
        self._adapter, self._weights, self._pool, self._batch = adapter, weights, pool, batch
        self.prompt = prompt
        self.n_new = self._capacity = 0
        device = prompt[0].keys.device
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first = torch.zeros((3, batch), dtype=torch.int64, device=device)
        self._state: DecodeState | None = None
        self._step: Callable[[], Tensor] | None = None

    def _widen(self, capacity: int) -> None:
        """Make room for new tokens, and keep those that there are."""
        before, n_new = self._state, self.n_new
        self._step, self._capacity = None, round_up(capacity)
        state = self._state = begin_decode(self.prompt, self._batch, self._capacity)
        state.n_new.fill_(n_new)
        for old, new in zip(before.caches if before else (), state.caches, strict=False):
            new.new_keys[:, :n_new].copy_(old.new_keys[:, :n_new])
            new.new_values[:, :n_new].copy_(old.new_values[:, :n_new])

    def _record(self, state: DecodeState) -> Callable[[], Tensor]:
        adapter, weights, tokens, first, n_new = self._adapter, self._weights, self._tokens, self._first, self.n_new
        return self._pool.record(
            lambda: decode_step(adapter, weights, state, tokens, first), rewind=lambda: state.n_new.fill_(n_new)
        )

    def load(self, prompt: Sequence[LayerCache]) -> None:
        """Copy a request's caches into the place of the last one's."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for own, layer in zip(self.prompt, prompt, strict=True):
            n_rows = layer.keys.shape[0]
            targets += [own.keys[:n_rows], own.values[:n_rows], own.cu_seqlens]
            sources += [layer.keys, layer.values, layer.cu_seqlens]
        torch._foreach_copy_(targets, sources)

    def cache_bytes(self, dense_length: int) -> tuple[int, int]:
        """Bytes of the prompts' keys and values, as they would be with ``dense_length`` rows and as they are."""
        per_row = [2 * layer.keys[0].numel() * layer.keys.element_size() for layer in self.prompt]
        rows = (layer.keys.shape[0] for layer in self.prompt)
        return sum(per_row) * dense_length, sum(size * n for size, n in zip(per_row, rows, strict=True))

    def start(self, next_positions: Tensor, capacity: int) -> None:
        """Begin with the first new token.

        Parameters
        ----------
        next_positions : Tensor of shape (3, batch), int64
            Its positions, on the host.
        capacity : int
            Most new tokens that will be run.
        """
        self._first.copy_(next_positions.pin_memory() if self._first.is_cuda else next_positions, non_blocking=True)
        self.n_new = 0
        if self._state is None or self._capacity < min(capacity, _FIRST_CAPACITY):
            self._widen(min(capacity, _FIRST_CAPACITY))
        else:
            self._state.n_new.zero_()

    def step(self, tokens: Tensor) -> Tensor:
        """One decode step, as :func:`~sparsevlm.engine.decode.decode_step`; the next overwrites what it gives."""
        if self.n_new == self._capacity:
            self._widen(2 * self._capacity)
        assert self._state is not None  # since the start
        if self._step is None:
            self._step = self._record(self._state)
        self._tokens.copy_(tokens)
        self.n_new += 1
        return self._step()


class DecodeGraphs(LRUCache[CacheShape, DecodeGraph]):
    """Decode graphs of prompts that were not captured.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool) -> None:
        super().__init__(_MOST_GRAPHS)
        self._adapter, self._weights, self._pool = adapter, weights, pool

    def take(self, prompt: Sequence[LayerCache], batch: int) -> DecodeGraph:
        """A decode graph that holds a request."""
        bucket = CacheShape.of(prompt, batch)
        decode_graph = self.get(bucket, lambda: self._make(bucket, prompt))
        decode_graph.load(prompt)
        return decode_graph

    def _make(self, bucket: CacheShape, like: Sequence[LayerCache]) -> DecodeGraph:
        empty = [
            LayerCache(
                layer.keys.new_zeros((rows, *layer.keys.shape[1:])),
                layer.values.new_zeros((rows, *layer.values.shape[1:])),
                torch.zeros_like(layer.cu_seqlens),
                max_seqlen,
            )
            for layer, rows, max_seqlen in zip(like, bucket.rows, bucket.max_seqlen, strict=True)
        ]
        return DecodeGraph(self._adapter, self._weights, self._pool, empty, bucket.batch)
