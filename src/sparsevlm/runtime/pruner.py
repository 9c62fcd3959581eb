"""Drops tokens on the way through the decoder: gathers hidden states, rotary tables, masks and cache slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..selection.context import Selection, SelectionContext
from ..selection.decide import decide, nothing_to_drop
from ..selection.recycle import merge_hidden_states
from .cache import DEAD, SlotTable, adopt
from .clock import Mark
from .forward import Forward
from .masks import pruned_mask
from .precision import no_autocast
from .reading import context_of, raters_of, read_target_layer
from .request import Request, StageRecord, stack_rows
from .view import ModelView


def before_layer(
    view: ModelView, forward: Forward, layer_idx: int, hidden_states: Tensor, kwargs: dict[str, Any]
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
    kwargs = _gathered_kwargs(view, forward, layer_idx, rows, hidden_states, kwargs)
    if request is not None:
        for sample in request.samples:
            sample.layer_tokens.append(sample.alive.shape[0])
        if layer_idx in request.target_layers and not request.keeps_all(layer_idx):
            read_target_layer(view, forward, request, layer_idx, hidden_states)
    return hidden_states, kwargs


def _gathered_kwargs(
    view: ModelView, forward: Forward, layer_idx: int, rows: Tensor | None, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    table = forward.table_of(layer_idx)
    mask = kwargs.get("attention_mask")
    if rows is None and (table is None or (mask is None and not table.has_dead)):
        return kwargs
    flash = "flash" in view.attn_implementation
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
    """Decide for every sample what goes on, and gather it."""
    begin = Mark.now(hidden_states.device)
    selections: list[Selection | None] = [None] * len(request.samples)
    with_visual = [b for b, sample in enumerate(request.samples) if sample.alive.shape[0]]
    # One by one where the selector takes no more, so that what it is given exists for one sample at a time.
    for some in [with_visual] if request.traits.batched else [[b] for b in with_visual]:
        for b, selection in zip(some, _decide(forward, request, some, target, hidden_states), strict=True):
            selections[b] = selection
    record_without_visual(request, target)
    forward.forget_layer()
    if any(selection is not None for selection in selections):
        hidden_states = _gather(forward, request, selections, hidden_states)
    request.clock.add("pruning", begin, Mark.now(hidden_states.device))
    return hidden_states


def _decide(
    forward: Forward, request: Request, samples: list[int], target: int, hidden: Tensor
) -> list[Selection | None]:
    """Selections of some samples, given by their rows of the batch."""
    attention = forward.text_attention  # empty where none was read
    rater_masks = [raters_of(request, b, attention[b]) if attention else None for b in samples]
    contexts = [
        context_of(forward, request, b, target, hidden, mask) for b, mask in zip(samples, rater_masks, strict=True)
    ]
    return record_decisions(request, target, samples, contexts, rater_masks)


def record_without_visual(request: Request, target: int) -> None:
    """The stage of samples that have nothing to drop."""
    for sample in request.samples:
        if not sample.alive.shape[0]:
            why = nothing_to_drop(0, None, request.config.min_keep)
            sample.stages.append(StageRecord(target, 0, None, why))


def record_decisions(
    request: Request,
    target: int,
    samples: Sequence[int],
    contexts: Sequence[SelectionContext],
    rater_masks: Sequence[Tensor | None],
) -> list[Selection | None]:
    """Decide for some samples, given by their rows of the batch, and record it as a stage of each."""
    place = request.target_layers.index(target)
    plans = [request.samples[b].plan for b in samples]
    n_keeps = [None if plan is None else plan.counts[place] for plan in plans]
    decisions = decide(contexts, request.selector, request.traits, n_keeps)
    for b, rater_mask, context, decision in zip(samples, rater_masks, contexts, decisions, strict=True):
        sample, selection = request.samples[b], decision.selection
        raters = None if rater_mask is None else sample.voters[rater_mask]
        record = StageRecord(target, context.n_visual, decision.rank, decision.skipped_because, raters)
        record.kept = sample.alive
        if selection is not None:
            record.kept = sample.alive[selection.keep_idx]
            if selection.recycled_idx is not None:
                record.recycled = sample.alive[selection.recycled_idx]
        sample.stages.append(record)
    return [decision.selection for decision in decisions]


def _gather(forward: Forward, request: Request, selections: list[Selection | None], hidden_states: Tensor) -> Tensor:
    """New rows, fillers on the left for unequal counts, merged states in their centres' places."""
    gathered, new_rows = [], []
    for b, (sample, selection) in enumerate(zip(request.samples, selections, strict=True)):
        before = sample.positions
        if selection is not None:
            sample.alive = sample.alive[selection.keep_idx]
        after = sample.positions
        positions = torch.cat([sample.other, after]).sort().values
        states = hidden_states[b, request.local_rows(b, positions)]
        if selection is not None and selection.merge_target is not None and selection.weight is not None:
            states[torch.searchsorted(positions, after)] = merge_hidden_states(
                hidden_states[b, request.local_rows(b, before)],
                selection.keep_idx,
                selection.merge_target,
                selection.weight,
            )
        gathered.append(states)
        new_rows.append(positions)
    request.rows = stack_rows(new_rows)
    lengths = [len(row) for row in new_rows]
    width = max(lengths)
    forward.tables.clear()
    forward.memo.clear()
    forward.rows_dead = min(lengths) < width
    return torch.stack([torch.nn.functional.pad(states, (0, 0, width - len(states), 0)) for states in gathered])
