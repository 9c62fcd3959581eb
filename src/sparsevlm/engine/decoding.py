"""New tokens of a request, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ..request.request import Request
from ..request.timing import Mark
from .runner import ModelRunner
from .text.decode_graph import DecodeGraph
from .text.kept_cache import Left, fill_cache
from .turn import Turn


@dataclass
class Decoding:
    """Steps of a request, see :class:`~.sampling.Steps`; of a turn on a kept cache, if it is one.

    Attributes
    ----------
    decode_graph : DecodeGraph
    request : Request
    runner : ModelRunner
    release_memory : callable
        Called where memory is wanting: the answer is lost, but not the next one.
    begin : Mark
        End of what came before the last step that counts.
    turn : Turn, optional
    """

    decode_graph: DecodeGraph
    request: Request
    runner: ModelRunner
    release_memory: Callable[[], None]
    begin: Mark
    turn: Turn | None = None

    @property
    def runs_ahead(self) -> bool:
        """On a GPU, unless room for the token has to be made first."""
        return self.decode_graph.runs_ahead

    def step(self, tokens: Tensor) -> Tensor:
        """Logits after one more token of every sample, (batch, vocab_size)."""
        try:
            with self.runner.open():
                logits = self.decode_graph.step(tokens)
        except torch.OutOfMemoryError:
            self.release_memory()
            raise
        self._end = Mark.now(logits.device)
        return logits

    def confirm(self) -> None:
        """Count the last step."""
        self.request.begin_decode_step()
        self.request.add_time("decode", self.begin, self._end)
        self.begin = self._end

    def take_back(self) -> None:
        """Undo the last step."""
        self.decode_graph.take_back()

    def keep(self, cache: DynamicCache) -> None:
        """Leave all keys and values in a cache."""
        caches, n_new = self.decode_graph.caches, self.decode_graph.n_new
        if self.turn is not None:
            self.turn.keep(self.request, caches, n_new)
        else:
            fill_cache(cache, self.request, [Left(own) for own in caches], n_new)
        self.request.finish(cache, self.request.kv_bytes)
