"""Keys and values of a request in a cache of transformers, as the hooks would have left them there, and out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ...kernels.attention import RaggedCache
from ...models import ModelAdapter
from ...request.kv_cache import adopt, check_cache, stack_rows
from ...request.request import Request
from ...request.slots import PAD_SLOT, SlotTable, next_table


def unsupported_past(adapter: ModelAdapter, cache: DynamicCache, batch: int) -> str | None:
    """Why a prompt of ``batch`` samples cannot go on with what a cache holds."""
    weight, past_len, layers = adapter.decoder.embed.weight, cache.get_seq_length(), list[Any](cache.layers)
    if len(layers) != adapter.n_layers or any(layer.keys is None for layer in layers):
        return f"a cache that is filled in part, or by a model of {len(layers)} layers"
    for layer in layers:
        table = getattr(layer, "table", None)
        n_slots = past_len if table is None else table.positions.shape[1] + table.appended
        if (layer.keys.device, layer.keys.dtype) != (weight.device, weight.dtype):
            return "a cache on another device, or in another dtype"
        if layer.keys.shape[0] != batch or layer.keys.shape[2] != n_slots:
            return f"a cache of {layer.keys.shape[0]} samples with {layer.keys.shape[2]} slots"
    return None


@dataclass(frozen=True)
class PastRows:
    """What a layer holds that is seen, sample by sample.

    Attributes
    ----------
    samples, slots : Tensor of shape (n_past,), int64
    lengths : list of int
        Of every sample.
    """

    samples: Tensor
    slots: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, table: SlotTable | None, seen: Tensor) -> PastRows:
        """Of layers with a table; ``seen`` says which positions are, (batch, past_len), bool."""
        if table is None:
            alive = seen
        else:
            slots = table.slots(table.appended).to(seen.device)
            alive = (slots != PAD_SLOT) & seen.gather(1, slots.clamp_min(0))
        samples, at = alive.nonzero().unbind(1)
        return cls(samples, at, alive.sum(dim=1).tolist())


@dataclass(frozen=True)
class Slots:
    """Slots for the tokens of a prompt in the layers of one stage.

    Attributes
    ----------
    shape : tuple of int
        Samples, and slots of each.
    index : Tensor of shape (n_rows,), int64
        Slot of every packed row, all samples' slots counted on.
    rows : Tensor of shape (batch, n_slots), int64, or None
        Position within the prompt by slot, -1: a filler; ``None``: nothing was dropped, there is one for every token.
    """

    shape: tuple[int, int]
    index: Tensor
    rows: Tensor | None = None

    @classmethod
    def of(cls, positions: Sequence[Tensor], q_len: int) -> Slots:
        """Of all tokens, at their positions, (n_rows,) by sample."""
        return cls((len(positions), q_len), torch.cat([own + b * q_len for b, own in enumerate(positions)]))

    @classmethod
    def before(cls, request: Request, layer_idx: int, device: torch.device) -> Slots:
        """Of what has reached a layer."""
        positions = [sample.positions_before(layer_idx).to(device) for sample in request.samples]
        n_whole = sum(sample.visual.shape[0] + sample.other.shape[0] for sample in request.samples)
        if sum(own.shape[0] for own in positions) == n_whole:
            return cls.of(positions, request.q_len)
        rows = stack_rows(positions)
        return cls((rows.shape[0], rows.shape[1]), (rows.flatten() != PAD_SLOT).nonzero()[:, 0], rows)

    def table(self, before: SlotTable | None, appended: int, request: Request, past_len: int) -> SlotTable:
        """Of layers that have dropped something, see :func:`~sparsevlm.request.slots.next_table`."""
        assert self.rows is not None
        tail, has_padding = min(sample.tail for sample in request.samples), self.index.shape[0] < self.rows.numel()
        return next_table(before, appended, self.rows, past_len, request.q_len, tail, has_padding)

    def unpacked(self, packed: Tensor, new: Tensor) -> Tensor:
        """Rows of a prompt, (at least n_rows, kv_heads, head_dim), in their slots, and new ones, (at least batch,
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


@dataclass(frozen=True)
class Left:
    """What a prompt has left in one layer.

    Attributes
    ----------
    cache : RaggedCache
    rows : Tensor of shape (n_rows,), int64, or None
        Those of the prompt among the packed ones; ``None``: they come first.
    """

    cache: RaggedCache
    rows: Tensor | None = None

    def unpacked(self, slots: Slots, n_new: int) -> tuple[Tensor, Tensor]:
        """Keys and values in their slots."""
        of = self.cache
        pairs = ((of.prompt_keys, of.new_keys), (of.prompt_values, of.new_values))
        keys, values = (
            slots.unpacked(packed if self.rows is None else packed[self.rows], new[:, :n_new]) for packed, new in pairs
        )
        return keys, values


def fill_cache(
    cache: DynamicCache, request: Request, left: Sequence[Left], n_new: int, text: Sequence[Tensor] = (), q_len: int = 0
) -> None:
    """Put what a prompt has left into a cache, behind what it holds.

    Parameters
    ----------
    cache : DynamicCache
        See :func:`~..support.unsupported_cache`.
    request : Request
    left : sequence of Left
        By layer.
    n_new : int
        New tokens that were run.
    text : sequence of Tensor of shape (n_rows,)
        Positions of a prompt of text, within it, by sample; empty: those of the request's samples.
    q_len : int
        Length of a prompt of text.
    """
    request.settle()
    check_cache(cache, len(left))
    past_len = cache.get_seq_length()
    layers: list[Any] = cache.layers
    tables = [getattr(layer, "table", None) for layer in layers]
    appended = [0 if table is None else table.appended for table in tables]
    made: dict[SlotTable | None, SlotTable] = {}
    device = left[0].cache.prompt_keys.device
    slots = Slots.of([own.to(device) for own in text], q_len) if text else None
    for layer_idx, own in enumerate(left):
        before, layer = tables[layer_idx], layers[layer_idx]
        if slots is None or (not text and layer_idx - 1 in request.target_layers):
            slots = Slots.before(request, layer_idx, device)
            made.clear()
        if slots.rows is not None:
            layer, owns = adopt(cache, layer_idx), before not in made
            if owns:
                made[before] = slots.table(before, appended[layer_idx], request, past_len)
                made[before].append(n_new)
            layer.place(made[before], owns)
        layer.update(*own.unpacked(slots, n_new))
