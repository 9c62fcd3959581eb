"""Keys and values of a request in a cache of transformers, as the hooks would have left them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...kernels.attention import RaggedCache
from ...request.kv_cache import PAD_SLOT, SlotTable, adopt, check_cache, stack_rows
from ...request.request import Request


@dataclass(frozen=True)
class Slots:
    """Slots of the layers of one stage.

    Attributes
    ----------
    shape : tuple of int
        Samples, and slots for what the prompt has left.
    index : Tensor of shape (n_rows,), int64
        Slot of every packed row, all samples' slots counted on.
    table : SlotTable or None
        ``None``: nothing was dropped, the slots are those of the prompt.
    """

    shape: tuple[int, int]
    index: Tensor
    table: SlotTable | None

    @classmethod
    def of(cls, request: Request, layer_idx: int, device: torch.device) -> Slots:
        """Slots of what has reached a layer."""
        positions = [sample.positions_before(layer_idx).to(device) for sample in request.samples]
        n_whole = sum(sample.visual.shape[0] + sample.other.shape[0] for sample in request.samples)
        if sum(own.shape[0] for own in positions) == n_whole:
            index = torch.cat([own + b * request.q_len for b, own in enumerate(positions)])
            return cls((request.batch, request.q_len), index, None)
        rows = stack_rows(positions)
        alive = rows.flatten() != PAD_SLOT
        tail = min(sample.tail for sample in request.samples)
        has_padding = len({own.shape[0] for own in positions}) > 1
        table = SlotTable(rows, request.q_len, tail, has_padding)
        return cls((rows.shape[0], rows.shape[1]), alive.nonzero()[:, 0], table)

    def unpacked(self, packed: Tensor, new: Tensor) -> Tensor:
        """Rows of the prompt, (at least n_rows, kv_heads, head_dim), in their slots, and new ones, (at least batch,
        n_new, kv_heads, head_dim), behind them.

        Returns
        -------
        Tensor of shape (batch, kv_heads, n_slots + n_new, head_dim)
            0 where nothing was left.
        """
        batch, n_slots = self.shape
        out = packed.new_zeros((batch * n_slots, *packed.shape[1:]))
        out[self.index] = packed[: self.index.shape[0]]
        return torch.cat([out.unflatten(0, self.shape), new[:batch]], dim=1).transpose(1, 2)


def fill_cache(cache: Cache, request: Request, caches: list[RaggedCache], n_new: int) -> None:
    """Put what a request has left into an empty cache, which holds it from now on.

    Parameters
    ----------
    cache : DynamicCache
        Empty, see :func:`~..support.unsupported_cache`.
    request : Request
    caches : list of RaggedCache
        By layer.
    n_new : int
        New tokens that were run.
    """
    request.settle()
    check_cache(cache, len(caches))
    device, slots = caches[0].prompt_keys.device, None
    for layer_idx, own in enumerate(caches):
        is_first = layer_idx - 1 in request.target_layers
        if slots is None or is_first:
            slots = Slots.of(request, layer_idx, device)
            if slots.table is not None:
                slots.table.append(n_new)
        if slots.table is not None:
            adopt(cache, layer_idx).place(slots.table, is_first or layer_idx == 0)
        layer: Any = cache.layers[layer_idx]
        layer.update(
            slots.unpacked(own.prompt_keys, own.new_keys[:, :n_new]),
            slots.unpacked(own.prompt_values, own.new_values[:, :n_new]),
        )
    request.finish(cache, request.kv_bytes)
