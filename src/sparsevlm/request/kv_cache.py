"""Cache layers that hold only the tokens that reached them, and report the lengths of all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from ..compat import QuantizedLayerBase
from .slots import PAD_SLOT, SlotTable


class PrunedLayer:
    """Mixin of a cache layer that holds only the tokens that reached it, yet reports logical lengths.

    ``table`` is ``None`` as long as nothing was dropped; ``owns_table`` is true for the one layer of a stage that
    moves the shared table along. ``placed`` says that the slots of the next update are in the table already.
    ``all_tables``, shared by all layers of a cache, knows every table in use; ``is_first`` is true for the layer that a
    cache crops before all others. That layer also holds the ``conversation``, where there is to be one
    (:class:`~.conversation.Conversation`), so that it lives as long, and is copied and reordered with the cache.
    """

    table: SlotTable | None
    owns_table: bool
    placed: bool
    is_first: bool
    all_tables: WeakSet[SlotTable]
    conversation: Any = None
    is_initialized: bool
    device: torch.device

    def place(self, table: SlotTable, owns_table: bool) -> None:
        """Take ``table``, which already holds the slots of the update to come."""
        self.all_tables.add(table)
        self.table, self.owns_table, self.placed = table, owns_table, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; see transformers' ``CacheLayerMixin.update``."""
        result = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        if self.placed:
            self.placed = False
        elif self.table is not None and self.owns_table:
            self.table.append(key_states.shape[-2])
        return result

    def get_seq_length(self) -> Any:
        """Logical length: what generation reckons with, dropped tokens included."""
        return super().get_seq_length() if self.table is None else self.table.length  # type: ignore[misc]

    def reset(self) -> None:
        """Forget everything, the table included."""
        self.table = self.conversation = None
        self.all_tables.clear()
        super().reset()  # type: ignore[misc]

    def prefetch(self) -> None:
        """Bring an offloaded layer back to its device, once the calls before are done with memory that it may take.

        transformers waits for them by itself from 5.20 on; before, keys that attention still reads were overwritten.
        """
        if self.is_initialized and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(torch.cuda.default_stream(self.device))
        super().prefetch()  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove tokens from the end; see transformers' ``DynamicLayer.crop`` and ``StaticLayer.crop``.

        A cache crops its layers one by one: the first answers for all of them, before any is touched.

        Raises
        ------
        ValueError
            If this would reach into the pruned part of any layer; nothing is changed then.
        """
        # Older transformers crop by a tensor, which a sum would go on to change wherever it is held.
        value = int(next(iter([*args, *kwargs.values()])))
        count = -value if value <= 0 else max(0, int(self.get_seq_length()) - value)
        for table in self.all_tables if self.is_first else ():
            table.check_crop(count)
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if self.table is not None and self.owns_table:
            self.table.crop(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder samples for beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._pick_rows(beam_idx)
        if self.table is not None and self.owns_table:
            self.table.index(beam_idx)

    def _pick_rows(self, batch_idx: Tensor) -> None:
        if self.conversation is not None:
            self.conversation = self.conversation.at(torch.as_tensor(batch_idx).tolist())


class PrunedDynamicLayer(PrunedLayer, DynamicLayer):
    """A :class:`PrunedLayer` of a ``DynamicCache``."""

    def reset(self) -> None:
        """Drop the tensors (older transformers only zero them, which keeps layers at unequal lengths)."""
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()

    def get_seq_length(self) -> int:
        """Logical length, by what this layer holds itself: the owner of its table may be ahead of it."""
        if self.table is None or self.keys is None:
            return super().get_seq_length()
        return self.keys.shape[-2] + self.table.n_dropped

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        if self.conversation is not None:
            self._pick_rows(torch.arange(self.conversation.batch).repeat_interleave(repeats))
        if self.table is not None and self.owns_table:
            self.table.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select samples."""
        super().batch_select_indices(indices)
        self._pick_rows(indices)
        if self.table is not None and self.owns_table:
            self.table.index(torch.as_tensor(indices))


class _OpenWindow(DynamicSlidingWindowLayer):
    """A layer with a sliding window that keeps all it is given once it has a table: the mask knows the window then."""

    table: SlotTable | None

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values."""
        if self.table is None:
            return super().update(*args, **kwargs)
        return DynamicLayer.update(self, *args, **kwargs)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a mask has to span, dropped ones included, and the position of the first."""
        if self.table is None:
            return super().get_mask_sizes(query_length)
        return self.get_seq_length() + query_length, 0

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove tokens from the end."""
        if self.table is None:
            super().crop(*args, **kwargs)
        else:
            DynamicLayer.crop(self, *args, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cumulative_length = 0


class PrunedSlidingLayer(PrunedDynamicLayer, _OpenWindow):
    """A :class:`PrunedLayer` of a ``DynamicCache`` whose layer has a sliding window."""


class PrunedStaticLayer(PrunedLayer, StaticLayer):
    """A :class:`PrunedLayer` of a ``StaticCache``; its buffers keep their full length."""


def stack_rows(rows: list[Tensor]) -> Tensor:
    """Rows of unequal numbers as one tensor, fillers on the left (transformers pads on the left when generating)."""
    width = max(row.shape[0] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (width - row.shape[0], 0), value=PAD_SLOT) for row in rows])


_PRUNED_CLASSES: dict[type, type[PrunedLayer]] = {
    DynamicLayer: PrunedDynamicLayer,
    DynamicSlidingWindowLayer: PrunedSlidingLayer,
    StaticLayer: PrunedStaticLayer,
}


def _pruned_class(kind: Any) -> type[PrunedLayer] | None:
    """The class by which a cache layer of another is pruned; ``None``: there is none."""
    if not issubclass(kind, QuantizedLayerBase):
        return _PRUNED_CLASSES.get(kind)
    from .quantized_cache import is_quantized, pruned_quantized_class

    return pruned_quantized_class(kind) if is_quantized(kind) else None


def check_cache(cache: Cache, n_layers: int, sliding: Collection[int] = ()) -> None:
    """Refuse caches whose layers cannot hold a pruned sequence, and create lazily missing layers.

    Parameters
    ----------
    cache : Cache
    n_layers : int
        Of the decoder.
    sliding : collection of int
        Those of them that have a sliding window, which knows what a cache with a window has left out.

    Raises
    ------
    NotImplementedError
        For unknown cache layers, and those with a window that is static or not the decoder's.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) < n_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    for i, layer in enumerate(cache.layers[:n_layers]):
        known = isinstance(layer, (PrunedLayer, LinearAttentionLayer)) or _pruned_class(type(layer)) is not None
        if not known or (type(layer) is DynamicSlidingWindowLayer and i not in sliding):
            raise NotImplementedError(
                f"{type(cache).__name__} with {type(layer).__name__} cannot hold a pruned sequence. Supported are the "
                "dynamic cache (the default), cache_implementation='static', 'quantized' or, on a GPU, 'offloaded'; "
                "or run this request inside state.options(keep=1.0)."
            )


def adopt(cache: Cache, layer_idx: int) -> Any:
    """Return the cache layer as a :class:`PrunedLayer`; it and those before it are swapped in place, but for recurrent
    ones."""
    layers: list[Any] = cache.layers
    first = next((layer for layer in layers if isinstance(layer, PrunedLayer)), None)
    for i, layer in enumerate(layers[: layer_idx + 1]):
        if isinstance(layer, (PrunedLayer, LinearAttentionLayer)):
            continue
        kind = _pruned_class(type(layer))
        assert kind is not None  # by check_cache
        pruned: Any = object.__new__(kind)
        pruned.__dict__.update(layer.__dict__)
        pruned.table, pruned.owns_table, pruned.placed, pruned.is_first = None, False, False, first is None
        pruned.all_tables = WeakSet() if first is None else first.all_tables
        first = first or pruned
        layers[i] = pruned
    return layers[layer_idx]


def empty_layers(cache: Cache) -> list[Any]:
    """New layers like those of a cache, without content; see :func:`check_cache` for what it may hold."""
    plain: dict[type, Any] = {pruned: kind for kind, pruned in _PRUNED_CLASSES.items()}
    pruned = {type(layer) for layer in cache.layers if isinstance(layer, PrunedLayer)}
    plain |= {kind: kind.__bases__[1] for kind in pruned if issubclass(kind, QuantizedLayerBase)}
    names = (
        *("sliding_window", "max_cache_len", "number_of_states"),
        *("nbits", "axis_key", "axis_value", "q_group_size", "residual_length"),
    )
    return [
        plain.get(type(layer), type(layer))(**{name: getattr(layer, name) for name in names if hasattr(layer, name)})
        for layer in cache.layers
    ]


def cache_bytes(layers: Iterable[Any], dense_length: int) -> tuple[int, int]:
    """Bytes of keys and values, as they would be dense and as they are.

    Parameters
    ----------
    layers : iterable of cache layers
        After the prefill.
    dense_length : int
        Slots of each layer without pruning (a static layer's buffers count in full both times).
    """
    dense = sparse = 0
    for layer in layers:
        if isinstance(layer, QuantizedLayerBase):
            from .quantized_cache import packed_bytes

            size = packed_bytes(layer)
            sparse += size
            dense += size // max(layer.cumulative_length, 1) * dense_length
            continue
        if getattr(layer, "keys", None) is None or layer.keys.ndim != 4:
            continue
        size = sum(states.numel() * states.element_size() for states in (layer.keys, layer.values))
        slots, window = layer.keys.shape[-2], getattr(layer, "sliding_window", None)
        sparse += size
        n_dense = dense_length if window is None else min(dense_length, window - 1)
        dense += size if hasattr(layer, "max_cache_len") else size // max(slots, 1) * n_dense
    return dense, sparse


def first_position(layer: Any, past_len: int) -> int:
    """Position of the first token that a layer without a table holds."""
    if not isinstance(layer, DynamicSlidingWindowLayer) or layer.keys is None:
        return 0
    return past_len - int(layer.keys.shape[-2])


def memory_note(layers: Iterable[Any]) -> str | None:
    """Say where dropped tokens' memory is not freed, or a window's bound does not hold."""
    layers = tuple(layers)
    if any(isinstance(layer, PrunedStaticLayer) for layer in layers):
        return "static cache: buffers keep their full length, dropped tokens free no memory"
    tables = [layer for layer in layers if getattr(layer, "table", None) is not None]
    if tables and any(isinstance(layer, LinearAttentionLayer) for layer in layers):
        return "recurrent layers: their states are as large as without pruning, are not counted, and cannot be cropped"
    if any(isinstance(layer, PrunedSlidingLayer) for layer in tables):
        return "sliding-window layers: behind the first drop they keep all tokens that are left, not the window alone"
    return None
