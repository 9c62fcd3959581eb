"""Drops tokens on the way through the decoder: gathers hidden states, rotary tables, masks and cache slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..models import ModelAdapter
from .cache import DEAD, SlotTable, adopt
from .clock import Mark
from .forward import Forward
from .masks import pruned_mask
from .precision import no_autocast
from .reading import read_target_layer
from .request import Request, stack_rows
from .step import Survivors, prune_step


def before_layer(
    adapter: ModelAdapter, forward: Forward, layer_idx: int, hidden_states: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Everything that has to happen before decoder layer ``layer_idx`` runs.

    Prunes if the layer before was a target; hands the layer gathered rotary tables, mask and slots; reads queries
    and keys if the layer is itself a target.
    """
    request = forward.request
    forward.disarm()
    if layer_idx == 0:
        forward.note_tables()
    if request is not None:
        request.to(hidden_states.device)
    if request is not None and layer_idx - 1 in request.target_layers:
        with no_autocast(hidden_states.device):
            hidden_states = _prune(forward, request, layer_idx - 1, hidden_states)
    rows = None if request is None else request.rows
    kwargs = _gathered_kwargs(adapter, forward, layer_idx, rows, hidden_states, kwargs)
    if request is not None:
        for sample in request.samples:
            sample.enter_layer()
        if layer_idx in request.target_layers and not request.keeps_all(layer_idx):
            read_target_layer(adapter, forward, request, layer_idx, hidden_states)
    return hidden_states, kwargs


def _gathered_kwargs(
    adapter: ModelAdapter, forward: Forward, layer_idx: int, rows: Tensor | None, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    table = forward.table_of(layer_idx)
    mask = kwargs.get("attention_mask")
    if rows is None and (table is None or (mask is None and not table.has_dead)):
        return kwargs
    flash = "flash" in adapter.attn_implementation
    if rows is None:
        assert table is not None
        past_len, q_len = table.logical_length(forward.appended[table]), hidden.shape[1]
    else:
        assert forward.request is not None
        past_len, q_len = forward.request.past_len, forward.request.q_len
        kwargs = {**kwargs, "position_embeddings": _rotary(forward, rows, kwargs["position_embeddings"])}
        kwargs["position_ids"] = None  # gapped ids would be taken for packed sequences by flash attention
        if forward.cache is not None:
            table = _placed_table(forward, forward.cache, layer_idx, rows, past_len, q_len)
    key = ("mask", id(table), id(mask))
    if key not in forward.memo:
        width = None if flash else _buffer_width(forward, layer_idx, mask, table)  # flash attention cuts the buffer
        if table is None:
            assert rows is not None
            slots, has_dead = rows, forward.rows_dead
        else:
            coming = 0 if rows is not None else forward.appended[table] + q_len
            slots, has_dead = table.slots(coming, width), table.has_dead
        forward.memo[key] = pruned_mask(
            mask, rows, slots, past_len, q_len, has_dead=has_dead or width is not None, flash=flash
        )
    return {**kwargs, "attention_mask": forward.memo[key]}


def _buffer_width(forward: Forward, layer_idx: int, mask: Any, table: SlotTable | None) -> int | None:
    """Number of keys that a static layer shows, which is its whole buffer, where the new mask has to span them."""
    layer: Any = None if forward.cache is None else forward.cache.layers[layer_idx]
    if not hasattr(layer, "max_cache_len"):
        return None
    if isinstance(mask, Tensor):
        return mask.shape[-1] if mask.ndim == 4 else None
    # Without a mask, queries and keys are aligned at their first: that needs no width, unless dead slots come first.
    return layer.max_cache_len if table is not None and table.has_dead else None


def _rotary(forward: Forward, rows: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    key = ("rotary", id(tables))
    if key not in forward.memo:
        idx = rows.clamp_min(0).to(tables[0].device)

        def gather(table: Tensor) -> Tensor:
            table = table.expand(rows.shape[0], -1, -1)
            return table.gather(1, idx[:, :, None].expand(-1, -1, table.shape[-1]))

        forward.memo[key] = (gather(tables[0]), gather(tables[1]))
    return forward.memo[key]


def _placed_table(forward: Forward, cache: Cache, layer_idx: int, rows: Tensor, past_len: int, q_len: int) -> SlotTable:
    """Slot table of a layer of the current stage: what it held before, then the rows that are left."""
    layer = adopt(cache, layer_idx)
    before = layer.table
    owns = before not in forward.tables
    if owns:
        absolute = torch.where(rows == DEAD, DEAD, rows + past_len)
        if before is not None:
            old = before.slots(forward.appended[before]).to(rows.device)
        else:
            old = torch.arange(past_len, device=rows.device).expand(rows.shape[0], -1)
        has_dead = forward.rows_dead or (before is not None and before.has_dead)
        tail = min(sample.tail for sample in forward.request.samples) if forward.request else 0
        table = SlotTable(torch.cat([old, absolute], dim=1), past_len + q_len, tail, has_dead)
        forward.tables[before] = table
    layer.place(forward.tables[before], owns)
    return forward.tables[before]


def _prune(forward: Forward, request: Request, target: int, hidden_states: Tensor) -> Tensor:
    """Decide what goes on of every sample, and gather it: fillers on the left for unequal counts."""
    begin = Mark.now(hidden_states.device)
    visual = [request.local_rows(b, sample.positions) for b, sample in enumerate(request.samples)]
    survivors = prune_step(request, target, lambda b: hidden_states[b, visual[b]], forward.readout)
    forward.forget_layer()
    if survivors is not None:
        hidden_states = _gather(forward, request, survivors, hidden_states)
    request.add_time("pruning", begin, Mark.now(hidden_states.device))
    return hidden_states


def _gather(forward: Forward, request: Request, survivors: list[Survivors], hidden_states: Tensor) -> Tensor:
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
    forward.begin_stage(has_dead=min(lengths) < width)
    return torch.stack([torch.nn.functional.pad(states, (0, 0, width - len(states), 0)) for states in gathered])
