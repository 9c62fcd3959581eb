"""Layers of quantized caches that hold only the tokens that reached them."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

from torch import Tensor
from transformers import cache_utils

from ..compat import QuantizedLayerBase
from .kv_cache import PrunedLayer

_NO_CROP = (
    "a quantized cache that is pruned cannot be cropped: keys are packed in groups of tokens. Start again with a new "
    "cache, or take the default one."
)


class PrunedQuantizedLayer(PrunedLayer):
    """A :class:`PrunedLayer` of a ``QuantizedCache``; what it packs are the tokens that are left."""

    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool
    cumulative_length: int

    def get_seq_length(self) -> int:
        """Logical length, by what this layer holds itself."""
        return self.cumulative_length + (0 if self.table is None else self.table.n_dropped)

    def reset(self) -> None:
        """Drop what is held, packed or not."""
        self.keys = self.values = None
        self._quantized_keys = self._quantized_values = None
        self.is_initialized = False
        super().reset()
        self.cumulative_length = 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to remove tokens.

        Raises
        ------
        NotImplementedError
        """
        raise NotImplementedError(_NO_CROP)


@functools.cache
def pruned_quantized_class(kind: Hashable) -> type[PrunedLayer]:
    """The pruned class of a layer class of transformers' quantized caches, whatever packs it."""
    of: Any = kind
    return type(f"Pruned{of.__name__}", (PrunedQuantizedLayer, of), {})


def is_quantized(kind: type) -> bool:
    """Tells whether a layer class is one of transformers' own quantized ones."""
    return issubclass(kind, QuantizedLayerBase) and kind.__module__ == cache_utils.__name__


def packed_bytes(layer: Any) -> int:
    """Bytes of the keys and values of a quantized layer: what is packed with its scales, and the rest that is not."""
    held = (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)
    return sum(map(_bytes_of, held))


def _bytes_of(held: Any) -> int:
    """Bytes of a tensor, or of all tensors in what a package packs: its subclasses of tensors, pairs, dictionaries."""
    if isinstance(held, Tensor):
        if type(held) is not Tensor and hasattr(held, "__tensor_flatten__"):
            return sum(_bytes_of(getattr(held, name)) for name in held.__tensor_flatten__()[0])
        return held.numel() * held.element_size()
    if isinstance(held, dict):
        held = tuple(held.values())
    return sum(map(_bytes_of, held)) if isinstance(held, (tuple, list)) else 0
