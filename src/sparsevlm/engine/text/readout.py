"""Reads what a selector needs of a target layer over packed rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.rater_attention import (
    Columns,
    PaddedRows,
    Rows,
    padded_attention,
    padded_statistics,
    row_attention,
    row_statistics,
)
from ...kernels.rater_choice import choose_raters, top_heads
from ...request.request import Request
from ...request.step import Readout, reads_text
from ...selection.scoring import top_k, visual_head_count
from ..cuda_graphs import to_device

if TYPE_CHECKING:
    from .prefill import PackedRows
    from .prune_program import PruneStep
    from .workspace import Workspace


def read(request: Request, space: Workspace, packed: PackedRows, target: int, scaling: float) -> Readout:
    """Take what the selector needs of a layer that has run.

    Parameters
    ----------
    request : Request
    space : Workspace
        Holds the layer's input, queries and keys.
    packed : PackedRows
    target : int
    scaling : float

    Returns
    -------
    Readout
    """
    needs, found = request.traits.needs, Readout()
    if request.keeps_all(target):
        return found
    visual = [packed.local(b, sample.positions) for b, sample in enumerate(request.samples)]
    if "previous_hidden_states" in needs:
        found.previous += [space.previous[rows] for rows in visual]
    attend = functools.partial(_attention, space, packed, visual, target, scaling)
    if reads_text(request):
        n_top_heads = visual_head_count(space.query.shape[1]) if request.config.heads == "visual" else None
        candidates = [sample.rater_candidates[: None if sample.alive.shape[0] else 0] for sample in request.samples]
        found.text += attend(candidates, n_top_heads)
    if "last_attention" in needs:
        found.last += [rows[0] for rows in attend([sample.last for sample in request.samples])]
    if "prior_attention" in needs:
        found.prior += [rows[0] for rows in attend([sample.behind for sample in request.samples])]
    return found


def _attention(
    space: Workspace, packed: PackedRows, visual: list[Tensor], target: int, scaling: float, positions: list[Tensor],
    n_top_heads: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """Attention of every sample's tokens at some positions to its visual ones, mean over the heads with the most of
    it, or over all."""
    n_rows, n_visual = ([own.shape[0] for own in some] for some in (positions, visual))
    key, device = space.keys[target][: packed.n_rows], space.query.device
    own_rows = torch.cat([packed.local(b, own) for b, own in enumerate(positions)])
    starts = torch.tensor([0, *n_rows], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = Rows(space.query[own_rows], to_device(starts, device), (own_rows + 1).int(), max(n_rows))
    numbers = to_device(torch.tensor(n_visual, dtype=torch.int32), device)
    columns = Columns(torch.nn.utils.rnn.pad_sequence(visual, batch_first=True), numbers)
    marked = torch.zeros(key.shape[0], dtype=torch.bool, device=device)
    marked[torch.cat(visual)] = True
    lse, mass = row_statistics(rows, key, space.cu_seqlens[: len(visual) + 1], marked, scaling)
    n_heads = space.query.shape[1]
    if n_top_heads is None:
        weight = mass.new_full((len(visual), n_heads), 1 / n_heads)
    else:
        weight = torch.stack([_share(own.sum(dim=0), n_top_heads) for own in mass.split(n_rows)])
    attention = row_attention(rows, key, columns, lse, weight, scaling)
    return [own[:, :n] for own, n in zip(attention.split(n_rows), n_visual, strict=True)]


def _share(mass: Tensor, n_top_heads: int) -> Tensor:
    """An even share in the mean for the heads with the most attention, none for the others."""
    weight = torch.zeros_like(mass)
    weight[top_k(mass, n_top_heads)] = 1 / n_top_heads
    return weight


@dataclass(frozen=True)
class PaddedReadout:
    """Readings of one target layer for samples filled up to one size; ``None``: not read.

    Attributes
    ----------
    raters : Tensor of shape (batch, n_text, n_visual), float32
        Attention of the raters, 0 for other text.
    is_rater : Tensor of shape (batch, n_text), bool
    last, prior : Tensor of shape (batch, n_visual), float32
    previous : Tensor of shape (batch, n_visual, hidden_size)
    text : Tensor of shape (batch, n_text, hidden_size)
        Embeddings of all text, and of what fills it up.
    is_text : Tensor of shape (batch, n_text), bool
    vision_attention : Tensor of shape (batch, 2, n_visual), float32
    vision_keys : Tensor of shape (batch, n_visual, head_dim), float32
    """

    raters: Tensor | None = None
    is_rater: Tensor | None = None
    last: Tensor | None = None
    prior: Tensor | None = None
    previous: Tensor | None = None
    text: Tensor | None = None
    is_text: Tensor | None = None
    vision_attention: Tensor | None = None
    vision_keys: Tensor | None = None

    def is_finite(self, valid: Tensor) -> Tensor:
        """Tells whether what was read before the decoder holds no NaN or infinity, as a tensor of shape ()."""
        found = torch.ones((), dtype=torch.bool, device=valid.device)
        for read, counts in (
            (self.text, None if self.is_text is None else self.is_text[..., None]),
            (self.vision_attention, valid[:, None]),
            (self.vision_keys, valid[..., None]),
        ):
            if read is not None and counts is not None:
                found = found & (torch.isfinite(read) | ~counts).all()
        return found


def read_padded(space: Workspace, step: PruneStep, visual_rows: Tensor, valid: Tensor) -> PaddedReadout:
    """Take what the selector and the rank need of a layer that has run, without waiting for it.

    Parameters
    ----------
    space : Workspace
        Holds the layer's input, and its queries and keys that are to be read.
    step : PruneStep
    visual_rows : Tensor of shape (batch, n_visual), int64
    valid : Tensor of shape (batch, n_visual), bool
    """
    if step.is_before:
        return _read_before(space, step, visual_rows)
    needs, shape, config = step.needs, step.shape, step.config
    raters = is_rater = last = prior = None
    if step.by_rank or "rater_attention" in needs:
        text = PaddedRows(space.query, space.text_rows[: shape.batch, : shape.n_text], space.n_text[: shape.batch])
        n_top_heads = visual_head_count(space.query.shape[1]) if config.heads == "visual" else None
        raters = _padded_attention(space, step, visual_rows, valid, text, n_top_heads)
        if config.raters == "attention":
            raters, is_rater = choose_raters(raters, text.numbers)
        elif config.raters == "embedding":
            is_rater = space.is_rater[: shape.batch, : shape.n_text]
            raters = torch.where(is_rater[..., None], raters, 0.0)
        else:
            is_rater = text.counts
    if {"last_attention", "prior_attention"} & needs:
        n_visual, last_row = space.n_visual[: shape.batch], space.cu_seqlens[1 : shape.batch + 1, None].long() - 1
    if "last_attention" in needs:
        rows = PaddedRows(space.query, last_row.clamp_min(0), n_visual.clamp_max(1))
        last = _padded_attention(space, step, visual_rows, valid, rows)[:, 0]
    if "prior_attention" in needs:
        behind = visual_rows.gather(1, (n_visual[:, None].long() - 1).clamp_min(0)) + 1
        rows = PaddedRows(space.query, torch.minimum(behind, last_row).clamp_min(0), n_visual.clamp_max(1))
        prior = _padded_attention(space, step, visual_rows, valid, rows)[:, 0]
    previous = space.previous[visual_rows] if "previous_hidden_states" in needs else None
    return PaddedReadout(raters, is_rater, last, prior, previous)


def _read_before(space: Workspace, step: PruneStep, visual_rows: Tensor) -> PaddedReadout:
    """What there is before the decoder."""
    needs, shape = step.needs, step.shape
    text = is_text = attention = keys = None
    if "text_features" in needs:
        text = space.hidden[space.text_rows[: shape.batch, : shape.n_text]]
        is_text = torch.arange(shape.n_text, device=text.device) < space.n_text[: shape.batch, None]
    encoded = space.feature_rows[visual_rows].clamp_min(0)
    if "vision_attention" in needs:
        attention = space.vision_attention[:, encoded].transpose(0, 1)
    if "vision_keys" in needs:
        keys = space.vision_keys[encoded]
    return PaddedReadout(text=text, is_text=is_text, vision_attention=attention, vision_keys=keys)


def _padded_attention(
    space: Workspace, step: PruneStep, visual_rows: Tensor, valid: Tensor, rows: PaddedRows,
    n_top_heads: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of every sample's rows that count to its visual tokens, mean over the heads with the most of it, or
    over all; (batch, n_rows, n_visual)."""
    batch, n_rows = step.shape.batch, step.shape.rows
    key, marked, weight = space.read_keys[:n_rows], None, None
    if n_top_heads is not None:
        marked = torch.zeros(n_rows + 1, dtype=torch.bool, device=key.device)
        marked = marked.index_fill_(0, torch.where(valid, visual_rows, n_rows).flatten(), True)[:n_rows]
    lse, mass = padded_statistics(rows, key, space.cu_seqlens[: batch + 1], marked, step.scaling)
    if n_top_heads is not None:
        assert mass is not None
        weight = top_heads(mass, n_top_heads)
    columns = Columns(visual_rows, space.n_visual[:batch])
    return padded_attention(rows, key, columns, lse, weight, step.scaling)
