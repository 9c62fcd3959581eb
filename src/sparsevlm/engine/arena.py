"""Tensors that stay in place over requests, so that one captured graph serves every decode step of a bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.view import ModelView
from .decode import DecodeState, begin_decode, decode_step
from .graphs import Recent, recorded
from .prefill import LayerCache

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


def round_up(n: int) -> int:
    """To a multiple of 16, or of an eighth of the power of two below: at most an eighth is left empty."""
    step = step_of(n)
    return -(-n // step) * step


def step_of(n: int) -> int:
    """Distance of the buckets around ``n``."""
    return max(16, 1 << max(0, n.bit_length() - 4))


class Arena:
    """Caches of one bucket, and the graph of its decode step.

    On a CPU there is no graph: the step runs as it is.

    Parameters
    ----------
    view : ModelView
    bucket : Bucket
    like : sequence of LayerCache
        For shapes, dtype and device.
    """

    def __init__(self, view: ModelView, bucket: Bucket, like: Sequence[LayerCache]) -> None:
        self._view, self.bucket = view, bucket
        empty = [
            LayerCache(
                layer.keys.new_zeros((rows, *layer.keys.shape[1:])),
                layer.values.new_zeros((rows, *layer.values.shape[1:])),
                torch.zeros_like(layer.offsets),
                longest,
            )
            for layer, rows, longest in zip(like, bucket.rows, bucket.longest, strict=True)
        ]
        self.state: DecodeState = begin_decode(empty, bucket.batch, bucket.room)
        keys = like[0].keys
        size = view.text_model.config.hidden_size
        self._hidden = keys.new_zeros((bucket.batch, size))
        self._position_ids = torch.zeros((3, bucket.batch, 1), dtype=torch.int64, device=keys.device)
        self._replay: Callable[[], Tensor] | None = None

    def load(self, prompt: Sequence[LayerCache]) -> None:
        """Take a request's caches in the place of the last one's."""
        for cache, layer in zip(self.state.caches, prompt, strict=True):
            cache.prompt_keys[: layer.keys.shape[0]].copy_(layer.keys)
            cache.prompt_values[: layer.values.shape[0]].copy_(layer.values)
            cache.offsets.copy_(layer.offsets)
        self.state.n_new.zero_()

    def step(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """One decode step, as :func:`~sparsevlm.engine.decode.decode_step`."""
        self._hidden.copy_(hidden)
        self._position_ids.copy_(position_ids)
        if self._replay is None:
            n_new = self.state.n_new
            filled = n_new.clone()
            # The runs before it is recorded write into slots that are still to be filled.
            self._replay = recorded(self._run, hidden.device, rewind=lambda: n_new.copy_(filled))
        return self._replay().clone()

    def _run(self) -> Tensor:
        return decode_step(self._view, self.state, self._hidden, self._position_ids)


class Arenas(Recent[Bucket, Arena]):
    """The arenas of a model.

    Parameters
    ----------
    view : ModelView
    """

    def __init__(self, view: ModelView) -> None:
        super().__init__(_MOST_ARENAS)
        self._view = view

    def take(self, prompt: Sequence[LayerCache], batch: int, room: int) -> Arena:
        """An arena that holds a request."""
        bucket = Bucket.of(prompt, batch, room)
        arena = self.get(bucket, lambda: Arena(self._view, bucket, prompt))
        arena.load(prompt)
        return arena
