"""New tokens, one per sample and step, over ragged caches: the step, and its graph on a workspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import RaggedCache, decode_attention
from ...kernels.elementwise import Norm, rotate_into
from ...kernels.skinny_linear import MOST_ROWS, skinny_linear
from ...models import ModelAdapter
from ...models.decoder import BlockModules
from ..capacities import power_of_two
from ..cuda_graphs import GraphPool, LRUCache, to_device
from ..fused_weights import DecodeWeights, FusedWeights, is_plain
from .layer import Attend, head_norms, rotary_tables, run_decode_layer, run_layer, summed
from .workspace import Workspace


@dataclass(frozen=True)
class DecodeState:
    """Buffers that a decode step reads and writes.

    Attributes
    ----------
    caches : list of RaggedCache
        One per layer; they share ``n_new``.
    n_new : Tensor of shape (1,), int32
        Tokens made so far.
    """

    caches: list[RaggedCache]
    n_new: Tensor


def begin_decode(space: Workspace, batch: int, capacity: int) -> DecodeState:
    """Make room for new tokens beside what the prompt has left.

    Parameters
    ----------
    space : Workspace
    batch : int
    capacity : int
        Most tokens that will come.
    """
    n_new = torch.zeros(1, dtype=torch.int32, device=space.hidden.device)
    caches = []
    for keys, values, cu_seqlens in zip(space.keys, space.values, space.layer_cu_seqlens, strict=True):
        shape = (batch, capacity, *keys.shape[1:])
        new_keys, new_values = keys.new_zeros(shape), values.new_zeros(shape)
        caches.append(RaggedCache(keys, values, cu_seqlens[: batch + 1], new_keys, new_values, n_new))
    return DecodeState(caches, n_new)


def decode_step(
    adapter: ModelAdapter, weights: DecodeWeights, state: DecodeState, tokens: Tensor, first: Tensor
) -> Tensor:
    """Run one token of every sample through the model.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : DecodeWeights
        The model's own for more samples than the kernels of few rows serve.
    state : DecodeState
        Moved on by one token; it must have room.
    tokens : Tensor of shape (batch,), int64
    first : Tensor of shape (n_axes, batch), int64
        Positions of the first new token of every sample; those of the next follow.

    Returns
    -------
    Tensor of shape (batch, vocab_size)
        Logits of the next token.
    """
    hidden = adapter.decoder.embed(tokens)
    slot = state.n_new.clone()
    cos, sin = rotary_tables(adapter.decoder, hidden, first + slot)
    state.n_new.add_(1)

    def attention(cache: RaggedCache, block: BlockModules) -> Attend:
        norms = head_norms(block)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query = rotate_into(query, key, value, cos, sin, cache.new_keys, cache.new_values, slot, norms)
            return decode_attention(query, cache, block.scaling)

        return attend

    attends = [attention(cache, block) for cache, block in zip(state.caches, weights.blocks, strict=True)]
    if tokens.shape[0] > (_MOST_PLAIN_ROWS if isinstance(weights, FusedWeights) else MOST_ROWS):
        assert isinstance(weights, FusedWeights)
        residual: Tensor | None = None
        for block, attend in zip(weights.blocks, attends, strict=True):
            hidden, residual = run_layer(block, weights, hidden, residual, attend)
        logits: Tensor = adapter.decoder.head(adapter.decoder.norm(summed(hidden, residual)))
        return logits
    for block, attend in zip(weights.blocks, attends, strict=True):
        hidden = run_decode_layer(block, weights, hidden, attend)
    return _logits(adapter, weights, hidden)


def _logits(adapter: ModelAdapter, weights: DecodeWeights, hidden: Tensor) -> Tensor:
    """Of a few rows; a norm or a head of another kind is called as it is."""
    norm, head = adapter.decoder.norm, adapter.decoder.head
    if type(norm) is type(weights.blocks[0].attention_norm) and is_plain(head):
        (product,) = weights.products(head, [head])
        return skinny_linear(hidden, product, Norm(norm.weight, norm.variance_epsilon))
    logits: Tensor = head(norm(hidden))
    return logits


# Rows up to which the kernels read weights as they are: of one they were measured faster than cuBLAS, of 16 slower.
_MOST_PLAIN_ROWS = 8
# New tokens that there is room for at first, at least and at most.
_LEAST_CAPACITY, _FIRST_CAPACITY = 64, 512
# Graphs that are kept, one a batch size and kind of weights.
_MOST_GRAPHS = 8


class DecodeGraph:
    """The graph of a decode step over the caches of a workspace.

    There is room for as many new tokens as were asked for, up to a number that many answers do not reach; where one
    does, the room is doubled and the step captured anew. On a CPU there is no graph: the step runs as it is.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : DecodeWeights
    pool : GraphPool
    space : Workspace
    batch : int
        Capacity of samples.
    """

    def __init__(
        self, adapter: ModelAdapter, weights: DecodeWeights, pool: GraphPool, space: Workspace, batch: int
    ) -> None:
        self._adapter, self._weights, self._pool, self._space, self._batch = adapter, weights, pool, space, batch
        self.n_new = self._capacity = 0
        device = space.hidden.device
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first = torch.zeros((space.n_axes, batch), dtype=torch.int64, device=device)
        self._state: DecodeState | None = None
        self._step: Callable[[], Tensor] | None = None

    @property
    def caches(self) -> list[RaggedCache]:
        """Keys and values by layer; ``n_new`` of the new ones count."""
        assert self._state is not None  # since the start
        return self._state.caches

    def _widen(self, capacity: int) -> None:
        """Make room for new tokens, and keep those that there are."""
        before, n_new = self._state, self.n_new
        capacity = power_of_two(max(_LEAST_CAPACITY, capacity))
        state = begin_decode(self._space, self._batch, capacity)
        self._step, self._state, self._capacity = None, state, capacity
        state.n_new.fill_(n_new)
        for old, new in zip(before.caches if before else (), state.caches, strict=False):
            new.new_keys[:, :n_new].copy_(old.new_keys[:, :n_new])
            new.new_values[:, :n_new].copy_(old.new_values[:, :n_new])

    def _capture(self, state: DecodeState) -> Callable[[], Tensor]:
        adapter, weights, tokens, first, n_new = self._adapter, self._weights, self._tokens, self._first, self.n_new
        return self._pool.record(
            lambda: decode_step(adapter, weights, state, tokens, first), rewind=lambda: state.n_new.fill_(n_new)
        )

    def start(self, next_positions: Tensor, capacity: int) -> None:
        """Begin with the first new token.

        Parameters
        ----------
        next_positions : Tensor of shape (n_axes, n_samples), int64
            Its positions, on the host.
        capacity : int
            Most new tokens that will be run.
        """
        n_samples = next_positions.shape[1]
        self._first[:, :n_samples].copy_(to_device(next_positions, self._first.device))
        self.n_new = 0
        if self._state is None or self._capacity < min(capacity, _FIRST_CAPACITY):
            self._widen(min(capacity, _FIRST_CAPACITY))
        else:
            self._state.n_new.zero_()

    @property
    def runs_ahead(self) -> bool:
        """Whether a step that is taken back later costs the host nothing: on a GPU, where there is room for it."""
        return self._tokens.is_cuda and self.n_new < self._capacity

    def take_back(self) -> None:
        """Undo the last step; only the end of an answer may follow, as the device goes on to count it."""
        self.n_new -= 1

    def step(self, tokens: Tensor) -> Tensor:
        """One decode step, as :func:`decode_step`; the next overwrites what it gives."""
        if self.n_new == self._capacity:
            self._widen(2 * self._capacity)
        assert self._state is not None  # since the start
        if self._step is None:
            self._step = self._capture(self._state)
        self._tokens[: tokens.shape[0]].copy_(tokens)
        self.n_new += 1
        return self._step()[: tokens.shape[0]]


class DecodeGraphs(LRUCache[tuple[int, bool], DecodeGraph]):
    """Decode graphs over one workspace, by the capacity of samples and the kind of weights.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool) -> None:
        super().__init__(_MOST_GRAPHS)
        self._adapter, self._weights, self._pool = adapter, weights, pool
        self._space: Workspace | None = None

    def over(self, space: Workspace, n_samples: int, is_float8: bool) -> DecodeGraph:
        """The decode graph for some samples whose prompts have left their keys and values in a workspace.

        Parameters
        ----------
        space : Workspace
        n_samples : int
        is_float8 : bool
            Whether it reads float8 copies of the weights; at most
            :data:`~sparsevlm.kernels.skinny_linear.MOST_ROWS` samples then.
        """
        if self._space is not space:
            self.clear()
            self._space = space
        batch, weights = power_of_two(n_samples), self._weights.float8() if is_float8 else self._weights
        return self.get((batch, is_float8), lambda: DecodeGraph(self._adapter, weights, self._pool, space, batch))

    def clear(self) -> None:
        """Free them all."""
        super().clear()
        self._space = None
