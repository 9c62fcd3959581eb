"""A prompt that goes on with a kept cache: new rows behind those of the past, layer by layer, without graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ...kernels.attention import continued_attention
from ...kernels.elementwise import rotate_into
from ...models import ModelAdapter
from ...request.request import Request
from ...request.slots import SlotTable
from ...request.step import choose_embedding_raters, reads
from ..cuda_graphs import to_device
from ..fused_weights import FusedWeights
from .kept_cache import PastRows
from .layer import Attend, head_norms, rotary_tables, run_layer, summed
from .prefill import PackedRows, prune
from .workspace import Workspace


@dataclass(frozen=True)
class KeyRows:
    """Where the rows of a turn are in a layer's keys, each sample's behind those of its past.

    Attributes
    ----------
    packed : PackedRows
        Of the keys; rows of the past have positions below 0.
    cu_seqlens : Tensor of shape (batch + 1,), int32
    past, new : Tensor of shape (n_past,) and (n_new,), int64
    """

    packed: PackedRows
    cu_seqlens: Tensor
    past: Tensor
    new: Tensor

    @classmethod
    def of(cls, past: PastRows, turn: PackedRows, device: torch.device) -> KeyRows:
        """Rows of ``turn`` behind those of the past."""
        both = [
            torch.cat([torch.arange(-n, 0, device=own.device), own])
            for n, own in zip(past.lengths, turn.positions, strict=True)
        ]
        # Negative positions count from the end, behind those of the turn.
        packed = PackedRows(both, turn.q_len + max(past.lengths))
        is_new = torch.cat([own >= 0 for own in both]).to(device)
        return cls(packed, _cu_seqlens(packed, device), (~is_new).nonzero()[:, 0], is_new.nonzero()[:, 0])


class Stage:
    """Rows of a turn between two prune steps.

    Parameters
    ----------
    packed : PackedRows
    device : torch.device

    Attributes
    ----------
    cu_seqlens : Tensor of shape (batch + 1,), int32
    """

    def __init__(self, packed: PackedRows, device: torch.device) -> None:
        self.packed, self._device = packed, device
        self.cu_seqlens = _cu_seqlens(packed, device)
        self._keys: dict[SlotTable | None, KeyRows] = {}

    def keys(self, table: SlotTable | None, past: PastRows) -> KeyRows:
        """Places in the keys of layers with a table."""
        if table not in self._keys:
            self._keys[table] = KeyRows.of(past, self.packed, self._device)
        return self._keys[table]


def _cu_seqlens(packed: PackedRows, device: torch.device) -> Tensor:
    return to_device(torch.tensor(packed.starts, dtype=torch.int32), device)


class SecondTurn:
    """Runs a turn of text, or with images.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    space : Workspace
        With room for the turn and all that the cache holds.
    cache : DynamicCache
    seen : Tensor of shape (batch, past_len), bool
        What of the past is no padding.

    Attributes
    ----------
    rows : list of Tensor of shape (n_new,), int64
        By layer, the turn's own among its packed keys.
    n_keys, n_past : int
        Keys of all layers, and those of the past among them.
    """

    def __init__(
        self, adapter: ModelAdapter, weights: FusedWeights, space: Workspace, cache: DynamicCache, seen: Tensor
    ) -> None:
        self._adapter, self._weights, self._space = adapter, weights, space
        self._layers: list[Any] = list(cache.layers)
        self._tables = [getattr(layer, "table", None) for layer in self._layers]
        self._past = {table: PastRows.of(table, seen) for table in set(self._tables)}
        self.rows: list[Tensor] = []
        self.n_keys = self.n_past = 0

    def run(
        self, request: Request | None, packed: PackedRows, embeds: Tensor, positions: Tensor, late: Sequence[Tensor]
    ) -> Tensor:
        """Run the turn.

        Parameters
        ----------
        request : Request or None
            Its samples are brought up to date; ``None``: a turn of text.
        packed : PackedRows
            Of the turn, on the device of ``embeds``.
        embeds : Tensor of shape (n_rows, hidden_size)
        positions : Tensor of shape (n_axes, n_rows), int64
        late : sequence of Tensor of shape (n_rows, hidden_size)
            What is added to the output of the first layers.

        Returns
        -------
        Tensor of shape (batch, vocab_size)
            Logits of every sample's last row.
        """
        space, decoder, device = self._space, self._adapter.decoder, embeds.device
        tables = rotary_tables(decoder, embeds, positions)
        for kept, rows in zip((space.hidden, space.cos, space.sin), (embeds, *tables), strict=True):
            kept[: packed.n_rows] = rows
        for plane, rows in zip(space.late, late, strict=False):
            plane[: packed.n_rows] = rows
        stage = Stage(packed, device)
        if request is not None:
            choose_embedding_raters(request, lambda b, of: space.hidden[packed.local(b, of)])
            if -1 in request.target_layers:
                stage = Stage(prune(request, space, packed, -1, 0.0, request.batch), device)
        hidden: Tensor = space.hidden[: stage.packed.n_rows]
        residual: Tensor | None = None
        for layer_idx in range(self._adapter.n_layers):
            pruned = request if request is not None and layer_idx in request.target_layers else None
            for sample in () if request is None else request.samples:
                sample.enter_layer()
            is_read = pruned is not None and reads(pruned)
            hidden, residual = self._run_layer(layer_idx, stage, hidden, residual, is_read)
            if layer_idx < len(late):
                hidden, residual = summed(hidden, residual) + space.late[layer_idx][: stage.packed.n_rows], None
            if pruned is not None:
                stage = self._prune(pruned, stage, layer_idx, summed(hidden, residual))
                hidden, residual = space.hidden[: stage.packed.n_rows], None
        logits: Tensor = decoder.head(decoder.norm(summed(hidden, residual)[stage.cu_seqlens[1:].long() - 1]))
        return logits

    def _keys(self, layer_idx: int, stage: Stage) -> KeyRows:
        table = self._tables[layer_idx]
        return stage.keys(table, self._past[table])

    def _run_layer(
        self, layer_idx: int, stage: Stage, hidden: Tensor, residual: Tensor | None, is_read: bool
    ) -> tuple[Tensor, Tensor]:
        """One layer over the rows of the turn; where it is read, its input and queries are left at the places of its
        keys."""
        space, keys = self._space, self._keys(layer_idx, stage)
        self.rows.append(keys.new)
        self.n_keys += keys.packed.n_rows
        self.n_past += keys.past.shape[0]
        space.layer_cu_seqlens[layer_idx] = keys.cu_seqlens[-1]
        space.layer_cu_seqlens[layer_idx, : keys.cu_seqlens.shape[0]] = keys.cu_seqlens
        if is_read:
            hidden, residual = summed(hidden, residual), None
            space.previous[keys.new] = hidden
        attend = self._attention(layer_idx, stage, is_read)
        return run_layer(self._weights.blocks[layer_idx], self._weights, hidden, residual, attend)

    def _attention(self, layer_idx: int, stage: Stage, is_read: bool) -> Attend:
        """Attention of a layer, which leaves all keys and values, those of the past among them, in the workspace."""
        space, keys, layer = self._space, self._keys(layer_idx, stage), self._layers[layer_idx]
        past, n, n_keys = self._past[self._tables[layer_idx]], stage.packed.n_rows, keys.packed.n_rows
        buffers = space.keys[layer_idx][:n_keys], space.values[layer_idx][:n_keys]
        block, most = self._weights.blocks[layer_idx], (stage.packed.longest, keys.packed.longest)
        for buffer, kept in zip(buffers, (layer.keys, layer.values), strict=True):
            buffer[keys.past] = kept.transpose(1, 2)[past.samples, past.slots]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            own_keys, own_values = (buffer.new_empty((n, *buffer.shape[1:])) for buffer in buffers)
            tables = space.cos[:n], space.sin[:n]
            query = rotate_into(query, key, value, *tables, own_keys, own_values, norms=head_norms(block))
            for buffer, own in zip(buffers, (own_keys, own_values), strict=True):
                buffer[keys.new] = own
            if is_read:
                space.query[keys.new] = query
            return continued_attention(query, *buffers, stage.cu_seqlens, keys.cu_seqlens, most, block.scaling)

        return attend

    def _prune(self, request: Request, stage: Stage, target: int, hidden: Tensor) -> Stage:
        """Decide what goes on from a layer, whose rows lie at the places of its keys for that."""
        space, keys, n = self._space, self._keys(target, stage), stage.packed.n_rows
        own = hidden, *(kept[:n].clone() for kept in space.moved[1:])
        for kept, rows in zip(space.moved, own, strict=True):
            kept[keys.new] = rows
        space.begin_stage(keys.packed.starts, request.batch)
        left = prune(request, space, keys.packed, target, self._weights.blocks[target].scaling, request.batch)
        if left is keys.packed:
            space.gather(keys.new)
            return stage
        return Stage(left, hidden.device)
