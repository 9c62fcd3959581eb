"""Tensors that stay in place over requests, so that one captured graph serves every decode step of a bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.view import ModelView
from .buckets import round_up
from .decode import DecodeState, begin_decode, decode_step
from .graphs import Recent, Recorder
from .prefill import LayerCache
from .weights import Weights

# Graphs that are kept; each holds the caches of its bucket.
_MOST_ARENAS = 4


@dataclass(frozen=True)
class Bucket:
    """What an arena has room for.

    Attributes
    ----------
    batch : int
    rows, longest : tuple of int
        By layer: rows of all prompts together, and of the longest.
    room : int
        New tokens.
    """

    batch: int
    rows: tuple[int, ...]
    longest: tuple[int, ...]
    room: int

    @classmethod
    def of(cls, prompt: Sequence[LayerCache], batch: int, room: int) -> Bucket:
        """The smallest bucket that holds a request."""
        rows = tuple(round_up(layer.keys.shape[0]) for layer in prompt)
        longest = tuple(round_up(layer.longest) for layer in prompt)
        return cls(batch, rows, longest, round_up(room))


class Arena:
    """The graph of a decode step over caches that stay in place.

    On a CPU there is no graph: the step runs as it is.

    Parameters
    ----------
    view : ModelView
    weights : Weights
    recorder : Recorder
    prompt : sequence of LayerCache
        Caches of the prompt.
    batch, room : int
        Samples, and new tokens.
    """

    def __init__(
        self, view: ModelView, weights: Weights, recorder: Recorder, prompt: Sequence[LayerCache], batch: int, room: int
    ) -> None:
        self.state: DecodeState = begin_decode(prompt, batch, room)
        self.prompt = prompt
        self.n_new = 0
        device = prompt[0].keys.device
        self._tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self._first = torch.zeros((3, batch), dtype=torch.int64, device=device)
        state, tokens, first = self.state, self._tokens, self._first
        self._step: Callable[[], Tensor] | None = None
        self._record = lambda: recorder.record(
            lambda: decode_step(view, weights, state, tokens, first), rewind=state.n_new.zero_
        )

    def load(self, prompt: Sequence[LayerCache]) -> None:
        """Copy a request's caches into the place of the last one's."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        for own, layer in zip(self.prompt, prompt, strict=True):
            n_rows = layer.keys.shape[0]
            targets += [own.keys[:n_rows], own.values[:n_rows], own.offsets]
            sources += [layer.keys, layer.values, layer.offsets]
        torch._foreach_copy_(targets, sources)

    def start(self, next_positions: Tensor) -> None:
        """Begin with the first new token, at these positions of shape (3, batch) on the host."""
        self._first.copy_(next_positions.pin_memory() if self._first.is_cuda else next_positions, non_blocking=True)
        self.state.n_new.zero_()
        self.n_new = 0

    def step(self, tokens: Tensor) -> Tensor:
        """One decode step, as :func:`~sparsevlm.engine.decode.decode_step`; the next overwrites what it gives."""
        if self._step is None:
            self._step = self._record()  # before the first token: recording begins anew
        self._tokens.copy_(tokens)
        self.n_new += 1
        return self._step()


class Arenas(Recent[Bucket, Arena]):
    """The arenas for prompts that had no program of their own.

    Parameters
    ----------
    view : ModelView
    weights : Weights
    recorder : Recorder
    """

    def __init__(self, view: ModelView, weights: Weights, recorder: Recorder) -> None:
        super().__init__(_MOST_ARENAS)
        self._view, self._weights, self._recorder = view, weights, recorder

    def take(self, prompt: Sequence[LayerCache], batch: int, room: int) -> Arena:
        """An arena that holds a request."""
        bucket = Bucket.of(prompt, batch, room)
        arena = self.get(bucket, lambda: self._make(bucket, prompt))
        arena.load(prompt)
        return arena

    def _make(self, bucket: Bucket, like: Sequence[LayerCache]) -> Arena:
        empty = [
            LayerCache(
                layer.keys.new_zeros((rows, *layer.keys.shape[1:])),
                layer.values.new_zeros((rows, *layer.values.shape[1:])),
                torch.zeros_like(layer.offsets),
                longest,
            )
            for layer, rows, longest in zip(like, bucket.rows, bucket.longest, strict=True)
        ]
        return Arena(self._view, self._weights, self._recorder, empty, bucket.batch, bucket.room)
