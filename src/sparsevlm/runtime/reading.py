"""Reads at a target layer, while it runs, what its selector asks for, and puts the selector's context together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..selection.context import SelectionContext
from ..selection.raters import attention_raters, embedding_raters
from ..selection.scoring import text_to_visual_attention, visual_head_count
from .forward import Forward
from .probe import AttentionInputs, AttentionProbe
from .request import Request
from .view import ModelView
from .vision_probe import VisionRows


def reads_text(request: Request) -> bool:
    """Whether the attention of the text that may vote is needed: by the selector, or by the rank that decides."""
    return "rater_attention" in request.traits.needs or any(sample.plan is None for sample in request.samples)


def read_target_layer(view: ModelView, forward: Forward, request: Request, layer_idx: int, hidden: Tensor) -> None:
    """Take what is needed of the layer's input, and prepare to read the attention to come."""
    needs, config = request.traits.needs, request.config
    if "previous_hidden_states" in needs:
        forward.previous = [
            hidden[b, request.local_rows(b, sample.positions)] for b, sample in enumerate(request.samples)
        ]
    text, last = reads_text(request), "last_attention" in needs
    if not text and not last:
        return
    table, offset = forward.table_of(layer_idx), request.past_len
    if table is not None:  # slots of this layer before this pass
        placed = table not in forward.appended
        offset = table.positions.shape[1] + (-hidden.shape[1] if placed else forward.appended[table])

    @torch.no_grad()
    def read(inputs: AttentionInputs) -> None:
        n_heads = inputs.query.shape[1]
        n_top_heads = visual_head_count(n_heads) if config.heads == "visual" else None
        samples = list(enumerate(request.samples))
        if text:
            forward.text_attention = [
                _rows_attention(request, b, sample.voters, offset, inputs, n_top_heads) for b, sample in samples
            ]
        if last:  # apart from the text rows, which are the same numbers with it and without
            forward.last_attention = [_rows_attention(request, b, sample.last, offset, inputs) for b, sample in samples]

    forward.probe = AttentionProbe(view.attentions[layer_idx], read)


def _rows_attention(
    request: Request, b: int, positions: Tensor, offset: int, inputs: AttentionInputs, n_top_heads: int | None = None
) -> Tensor:
    """Attention of a sample's tokens at some positions to its visual tokens, (n_positions, n_visual)."""
    rows = request.local_rows(b, positions)
    visual_rows = request.local_rows(b, request.samples[b].positions)
    query, key, mask = inputs.query[b], inputs.key[b], inputs.mask
    row_mask = key_mask = None
    if isinstance(mask, Tensor) and mask.ndim == 4:
        row_mask = mask[min(b, mask.shape[0] - 1), 0][rows]
    elif isinstance(mask, Tensor):
        key_mask = torch.nn.functional.pad(mask[b].bool(), (0, key.shape[1] - mask.shape[1]))
    return text_to_visual_attention(
        query[:, rows], key, visual_rows + offset, rows + offset, inputs.scaling, row_mask, key_mask, n_top_heads
    )


def raters_of(request: Request, b: int, attention: Tensor) -> Tensor:
    """Which of a sample's voters are raters at the target layer that has just run.

    Parameters
    ----------
    request : Request
    b : int
        Row of the batch.
    attention : Tensor of shape (n_voters, n_visual)
        What was read of the voters at that layer.

    Returns
    -------
    Tensor of shape (n_voters,), bool
    """
    if request.config.raters == "all":
        return attention.new_ones(attention.shape[0], dtype=torch.bool)
    if request.config.raters == "attention":
        return attention_raters(attention)
    sample = request.samples[b]
    if sample.embedding_raters is None:
        assert request.features is not None
        features = request.features[b].to(attention.device)
        sample.embedding_raters = embedding_raters(features[sample.visual], features[sample.voters])
    return sample.embedding_raters.to(attention.device)


def context_of(
    forward: Forward, request: Request, b: int, target: int, hidden: Tensor, rater_mask: Tensor | None
) -> SelectionContext:
    """The context of one sample at a target layer whose output is ``hidden``, with what the selector needs."""
    sample = request.samples[b]
    vision = forward.vision[b].at(sample.alive) if forward.vision else VisionRows()
    return make_context(
        request,
        b,
        target,
        hidden[b, request.local_rows(b, sample.positions)],
        rater_attention=None if rater_mask is None else forward.text_attention[b][rater_mask],
        last_attention=forward.last_attention[b][0] if forward.last_attention else None,
        vision_attention=vision.vision_attention,
        vision_keys=vision.vision_keys,
        previous_hidden_states=forward.previous[b] if forward.previous else None,
    )


def make_context(request: Request, b: int, target: int, hidden_states: Tensor, **read: Any) -> SelectionContext:
    """The context of one sample with ``hidden_states`` left: what the request knows of it, and ``read``."""
    sample, needs, device = request.samples[b], request.traits.needs, hidden_states.device
    positions, coordinates = sample.positions, request.coordinates
    features = None if request.features is None else request.features[b].to(device)
    return SelectionContext(
        layer=target,
        sample=b,
        config=request.config,
        hidden_states=hidden_states,
        coordinates=positions.expand(3, -1) if coordinates is None else coordinates[:, b].to(device)[:, positions],
        indices=sample.alive.clone(),  # a selector may write into what it is given
        features=features[positions] if features is not None and "features" in needs else None,
        text_features=features[sample.text] if features is not None and "text_features" in needs else None,
        **read,
    )
