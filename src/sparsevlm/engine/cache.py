"""What stands in a cache of transformers for a layer whose keys and values the engine keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .arena import Arena
from .prefill import LayerCache


class EngineLayer(DynamicLayer):
    """A layer of a cache whose keys and values the engine keeps; it tells ``generate`` the logical length.

    Parameters
    ----------
    prompt : LayerCache
    arena : Arena
    batch, length : int
        Of the padded prompt.
    """

    def __init__(self, prompt: LayerCache, arena: Arena, batch: int, length: int) -> None:
        super().__init__()
        self._prompt, self._arena, self._batch, self._length = prompt, arena, batch, length

    def get_seq_length(self) -> int:
        """Logical length, dropped tokens included."""
        return self._length + self._arena.n_new

    def cache_bytes(self, dense_length: int) -> tuple[int, int]:
        """Bytes of the prompt's keys and values, as they would be dense and as they are."""
        keys = self._prompt.keys
        per_row = 2 * keys[0].numel() * keys.element_size()
        return per_row * self._batch * dense_length, per_row * keys.shape[0]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Nobody but the engine appends."""
        raise RuntimeError("this cache belongs to a generate call that has ended; start again with a new cache.")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = update  # type: ignore[assignment]
