"""Drops tokens on the way through the decoder: gathers hidden states, rotary tables, masks and cache slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..models import RECURRENT, SLIDING, Layout, ModelAdapter
from ..request.kept_features import KeptFeatures
from ..request.kv_cache import adopt, first_position, stack_rows
from ..request.request import Request
from ..request.slots import SlotTable, next_table
from ..request.step import Readout, Survivors, prune_step, reads
from ..request.timing import Mark
from .attention_probe import AttentionProbe
from .late_rows import LateRows
from .masks import pruned_mask, row_mask
from .readout import read_target_layer


@dataclass
class ForwardPass:
    """State of one pass through the decoder; gone when the pass ends.

    Attributes
    ----------
    request : Request or None
        Set while this pass may prune.
    visual_masks : dict
        Of shape (batch, q_len), bool: which tokens are visual, per kind (image, video) that the pass brings.
    appended : dict
        Tokens that each table of the cache had counted when the pass began: its first layer moves it along early.
    tables : dict
        Slot table of this pass's current stage by the table that the layers had before; where they had none, by the
        position of the first token that they held.
    memo : dict
        Masks and rotary tables that the layers of a stage share.
    rows_padded : bool
        Whether ``request.rows`` holds fillers.
    is_flash : bool
        Whether the decoder's attention takes 2D masks.
    probe : AttentionProbe or None
        Of the target layer that was the last to be read.
    readout : Readout
        What was read at the target layer that has just run, and in the vision tower.
    late : LateRows or None
        Features to be added behind the first layers, where the decoder itself is not to do so.
    q_len : int
        Tokens of the pass.
    ids : Tensor of shape (batch, q_len), int64, or None
        The same.
    layouts : sequence of sequence of Layout
        Of its images, by row, of a pass that is no request.
    kept : KeptFeatures or None
        Features of earlier turns, to be put in the places of their tokens.
    is_beside : bool
        Whether it is none of the request's own: its time, steps and cache are not the request's.
    """

    cache: Cache | None
    request: Request | None = None
    visual_masks: dict[str, Tensor] = field(default_factory=dict)
    appended: dict[SlotTable, int] = field(default_factory=dict)
    tables: dict[SlotTable | int, SlotTable] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    rows_padded: bool = False
    is_flash: bool = False
    probe: AttentionProbe | None = None
    readout: Readout = field(default_factory=Readout)
    late: LateRows | None = None
    q_len: int = 0
    ids: Tensor | None = None
    layouts: Sequence[Sequence[Layout]] = ()
    kept: KeptFeatures | None = None
    is_beside: bool = False

    @property
    def _cache_layers(self) -> Sequence[Any]:
        """Layers of the cache; a cache of another make may have none."""
        return getattr(self.cache, "layers", ())

    def note_tables(self) -> None:
        """Remember how far every table of the cache has come."""
        for layer in self._cache_layers:
            table = getattr(layer, "table", None)
            if table is not None:
                self.appended[table] = table.appended

    def table_of(self, layer_idx: int) -> SlotTable | None:
        """Slot table of a cache layer, if it has one."""
        layers = self._cache_layers
        return getattr(layers[layer_idx], "table", None) if layer_idx < len(layers) else None

    def buffer(self, layer_idx: int) -> int | None:
        """Number of keys that a static cache layer shows, filled or not; ``None``: it grows."""
        layers = self._cache_layers
        return getattr(layers[layer_idx], "max_cache_len", None) if layer_idx < len(layers) else None

    def slot_offset(self, layer_idx: int, n_rows: int) -> int:
        """Slot of a layer's cache that the first of ``n_rows`` rows of this pass goes to."""
        table = self.table_of(layer_idx)
        if table is None:
            past_len = 0 if self.request is None else self.request.past_len
            layers = self._cache_layers
            return past_len - (first_position(layers[layer_idx], past_len) if layer_idx < len(layers) else 0)
        placed = table not in self.appended  # it holds the slots of this pass already
        return table.positions.shape[1] + (-n_rows if placed else self.appended[table])

    def forget_layer(self) -> None:
        """Drop what was read at the target layer that has just run."""
        self.readout = Readout(vision=self.readout.vision)

    def begin_stage(self, *, has_padding: bool) -> None:
        """Forget what the layers before a cut shared; ``has_padding``: the rows that are left hold fillers."""
        self.tables.clear()
        self.memo.clear()
        self.rows_padded = has_padding

    def disarm(self) -> None:
        """End the reading of a layer that has run, or failed."""
        if self.probe is not None:
            self.probe.disarm()
            self.probe = None


def before_layer(
    adapter: ModelAdapter, forward: ForwardPass, layer_idx: int, hidden_states: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Everything that has to happen before decoder layer ``layer_idx`` runs.

    Prunes if the layer before was a target; hands the layer gathered rotary tables, mask and slots; reads queries
    and keys if the layer is itself a target.
    """
    request = forward.request
    forward.disarm()
    if layer_idx == 0:
        forward.note_tables()
        forward.q_len = hidden_states.shape[1]
    if request is not None:
        request.to(hidden_states.device)
        if forward.late is not None:
            hidden_states = forward.late.add(request, layer_idx - 1, hidden_states)
    if request is not None and layer_idx - 1 in request.target_layers:
        hidden_states = _prune(forward, request, layer_idx - 1, hidden_states)
    rows = None if request is None else request.rows
    if layer_idx == adapter.decoder.first_shared and request is not None and rows is not None:
        hidden_states = hidden_states[:, -request.n_last :]
    if forward.is_flash and (rows is not None or forward.table_of(layer_idx) is not None):
        _check_flash(adapter, layer_idx)
    if adapter.decoder.layer_types[layer_idx] == RECURRENT:
        kwargs = _recurrent_kwargs(forward, rows, kwargs)
    else:
        kwargs = _gathered_kwargs(adapter, forward, layer_idx, rows, hidden_states, kwargs)
    if request is not None:
        for sample in request.samples:
            sample.enter_layer()
        if layer_idx in request.target_layers and reads(request) and not request.keeps_all(layer_idx):
            offset = forward.slot_offset(layer_idx, hidden_states.shape[1])
            attention = adapter.decoder.attentions[layer_idx]
            forward.probe = read_target_layer(attention, request, hidden_states, offset, forward.readout)
    return hidden_states, kwargs


def gathered_arguments(
    adapter: ModelAdapter, forward: ForwardPass, hidden_states: Tensor, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Positional arguments of a layer that is given ``hidden_states``: what they hold for each token goes on with it.

    A merged token has what belongs to the place that it takes, as it has its position.
    """
    rows = None if forward.request is None else forward.request.rows
    if rows is None:
        return (hidden_states, *args[1:])
    rows, per_token = rows[:, -hidden_states.shape[1] :], adapter.decoder.per_token
    return (
        hidden_states,
        *(_at_rows(arg, rows) if i in per_token and arg is not None else arg for i, arg in enumerate(args) if i),
    )


def _gathered_kwargs(
    adapter: ModelAdapter,
    forward: ForwardPass,
    layer_idx: int,
    rows: Tensor | None,
    hidden: Tensor,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    source, n_rows = adapter.decoder.key_layers[layer_idx], hidden.shape[1]
    table = forward.table_of(source)
    mask, flash, buffer = kwargs.get("attention_mask"), forward.is_flash, forward.buffer(source)
    # Flash attention cuts a static layer's buffer to its mask: without one, all of it is seen.
    needs_cut = flash and mask is None and buffer is not None
    if rows is None and (table is None or (mask is None and not table.has_padding and not needs_cut)):
        return kwargs
    if rows is None:
        assert table is not None
        past_len, q_len = table.logical_length(forward.appended[table]), forward.q_len
        queries = _last_rows(table, q_len, n_rows) if mask is None and n_rows < q_len else None
    else:
        assert forward.request is not None
        past_len, q_len, queries = forward.request.past_len, forward.request.q_len, rows[:, -n_rows:]
        kwargs = {**kwargs, "position_embeddings": _rotary(forward, queries, kwargs["position_embeddings"])}
        kwargs["position_ids"] = None  # gapped ids would be taken for packed sequences by flash attention
        if forward.cache is not None and source == layer_idx:
            table = _placed_table(forward, forward.cache, layer_idx, rows, past_len, q_len)
    key = ("mask", id(table), id(mask), n_rows)
    if key not in forward.memo:
        width = None if flash else _mask_width(buffer, mask, table)
        if table is None:
            assert rows is not None
            slots, has_padding = rows, forward.rows_padded
        else:
            coming = 0 if rows is not None else forward.appended[table] + q_len
            slots, has_padding = table.slots(coming, width), table.has_padding
        is_part = rows is not None and 1 < n_rows < rows.shape[1]  # whose causality is no longer that of the first row
        has_padding = has_padding or width is not None or needs_cut or is_part
        needed = mask is not None or has_padding
        forward.memo[key] = (
            pruned_mask(mask, queries, slots, past_len, q_len, has_padding=has_padding, flash=flash) if needed else None
        )
    return {**kwargs, "attention_mask": forward.memo[key]}


def _last_rows(table: SlotTable, q_len: int, n_rows: int) -> Tensor:
    """The last rows of a pass, which the model itself has cut, (batch, n_rows)."""
    positions = table.positions
    return torch.arange(q_len - n_rows, q_len, device=positions.device).expand(positions.shape[0], -1)


def _recurrent_kwargs(forward: ForwardPass, rows: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a layer that goes over its rows one by one: dropped ones are not there."""
    if rows is None:
        return kwargs
    key = ("rows", id(kwargs["attention_mask"]))
    if key not in forward.memo:
        forward.memo[key] = row_mask(kwargs["attention_mask"], rows, has_padding=forward.rows_padded)
    return {**kwargs, "attention_mask": forward.memo[key], "position_ids": None}


def _check_flash(adapter: ModelAdapter, layer_idx: int) -> None:
    """Refuse flash attention in a layer with a sliding window, which it counts in slots."""
    if adapter.decoder.layer_types[layer_idx] == SLIDING:
        raise NotImplementedError(
            f"decoder layer {layer_idx} has a sliding window, which flash attention counts in the tokens that are "
            "left, not in positions. Call model.set_attn_implementation('sdpa') or 'eager', or run this request inside "
            "state.options(keep=1.0)."
        )


def _mask_width(buffer: int | None, mask: Any, table: SlotTable | None) -> int | None:
    """Number of keys that the new mask has to span where a static layer shows its whole ``buffer``."""
    if buffer is None:
        return None
    if isinstance(mask, Tensor):
        return mask.shape[-1] if mask.ndim == 4 else None
    # Without a mask, queries and keys are aligned at their first: that needs no width, unless dead slots come first.
    return buffer if table is not None and table.has_padding else None


def _rotary(forward: ForwardPass, rows: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    key = ("rotary", id(tables), rows.shape[1])
    if key not in forward.memo:
        forward.memo[key] = (_at_rows(tables[0], rows), _at_rows(tables[1], rows))
    return forward.memo[key]


def _at_rows(states: Tensor, rows: Tensor) -> Tensor:
    """What is at some rows of a tensor (batch or 1, q_len, size), where fillers have that of any."""
    idx = rows.clamp_min(0).to(states.device)
    states = states.expand(rows.shape[0], -1, -1)
    return states.gather(1, idx[:, :, None].expand(-1, -1, states.shape[-1]))


def _placed_table(
    forward: ForwardPass, cache: Cache, layer_idx: int, rows: Tensor, past_len: int, q_len: int
) -> SlotTable:
    """Slot table of a layer of the current stage: what it held before, then the rows that are left."""
    layer = adopt(cache, layer_idx)
    before = layer.table
    first = first_position(layer, past_len) if before is None else 0
    key = first if before is None else before
    owns = key not in forward.tables
    if owns:
        tail = min(sample.tail for sample in forward.request.samples) if forward.request else 0
        appended = 0 if before is None else forward.appended[before]
        forward.tables[key] = next_table(before, appended, rows, past_len, q_len, tail, forward.rows_padded, first)
    layer.place(forward.tables[key], owns)
    return forward.tables[key]


def _prune(forward: ForwardPass, request: Request, target: int, hidden_states: Tensor) -> Tensor:
    """Decide what goes on of every sample, and gather it: fillers on the left for unequal counts."""
    begin = Mark.now(hidden_states.device)
    visual = [request.local_rows(b, sample.positions) for b, sample in enumerate(request.samples)]
    survivors = prune_step(request, target, lambda b: hidden_states[b, visual[b]], forward.readout)
    forward.forget_layer()
    if survivors is not None:
        hidden_states = _gather(forward, request, survivors, hidden_states)
        if forward.late is not None:
            forward.late.keep(survivors)
    request.add_time("pruning", begin, Mark.now(hidden_states.device))
    return hidden_states


def _gather(forward: ForwardPass, request: Request, survivors: list[Survivors], hidden_states: Tensor) -> Tensor:
    rows = [sample.all_positions for sample in request.samples]
    gathered = []
    for b, (own, kept) in enumerate(zip(rows, survivors, strict=True)):
        states = hidden_states[b, request.local_rows(b, own)]
        if kept.merges:
            before = hidden_states[b, request.local_rows(b, kept.before)]
            states[torch.searchsorted(own, kept.after)] = kept.merged(before)
        gathered.append(states)
    lengths = [len(own) for own in rows]
    width = max(lengths)
    request.place(stack_rows(rows))
    forward.begin_stage(has_padding=min(lengths) < width)
    return torch.stack([torch.nn.functional.pad(states, (0, 0, width - len(states), 0)) for states in gathered])
