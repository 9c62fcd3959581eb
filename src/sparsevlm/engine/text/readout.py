"""Reads what a selector needs of a target layer over packed rows."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.rater_attention import Columns, Rows, row_attention, row_statistics
from ...request.request import Request
from ...request.step import Readout, reads_text
from ...selection.context import VISION_NEEDS
from ...selection.scoring import top_k, visual_head_count
from ..cuda_graphs import to_device

if TYPE_CHECKING:
    from .prefill import PackedRows
    from .workspace import Workspace

# Selectors that need this run on the plain path, which looks into the tower.
NOT_PROVIDED = VISION_NEEDS


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
