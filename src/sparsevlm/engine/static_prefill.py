"""The prompt of a bucket: every shape fixed, every choice made on the device, nothing waited for.

What :mod:`.prefill` does with exact numbers of rows is done here with room for a little more: rows that fill up form a
sequence of their own behind the samples, tokens that fill up come last in every choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.varlen_attention import varlen_attention
from ..runtime.request import Request, StageRecord
from ..runtime.view import ModelView
from ..selection.decide import nothing_to_drop
from ..selection.greedy import dpp_order, dpp_order_by_gram
from ..selection.selectors.span import SpanSelector
from .arena import round_up, step_of
from .layer import run_layer
from .prefill import LayerCache, Packed


@dataclass(frozen=True)
class Plan:
    """What a bucket's program has to know; equal plans share it.

    Attributes
    ----------
    targets : tuple of int
        Target layers at which some sample drops tokens.
    batch : int
    rows : tuple of int
        Room for rows before the first and after each of ``targets``.
    visual : tuple of int
        Room for visual tokens of one sample, likewise.
    longest : tuple of int
        Room for the longest sample, likewise.
    """

    targets: tuple[int, ...]
    batch: int
    rows: tuple[int, ...]
    visual: tuple[int, ...]
    longest: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """The numbers of one request, by stage (before the first target and after each) and sample."""

    visual: list[list[int]]
    total: list[list[int]]


def count(request: Request) -> tuple[tuple[int, ...], Counts]:
    """Which targets drop something, and what is left then: known beforehand with fixed budgets."""
    alive = [sample.alive.shape[0] for sample in request.samples]
    others = [sample.other.shape[0] for sample in request.samples]
    targets, visual = [], [alive]
    for stage, target in enumerate(request.target_layers):
        left = []
        for sample, n in zip(request.samples, visual[-1], strict=True):
            assert sample.plan is not None  # of a fixed budget
            n_keep = sample.plan.counts[stage]
            left.append(n_keep if nothing_to_drop(n, n_keep, request.config.min_keep) is None else n)
        if left != visual[-1]:
            targets.append(target)
            visual.append(left)
    total = [[n + other for n, other in zip(counts, others, strict=True)] for counts in visual]
    return tuple(targets), Counts(visual, total)


def plan(request: Request) -> tuple[Plan, Counts]:
    """The bucket of a request."""
    targets, counts = count(request)
    rows = tuple(round_up(sum(total) + 1) for total in counts.total)  # one filler at least
    visual = tuple(max(1, round_up(max(numbers))) for numbers in counts.visual)
    longest = rows
    if len(request.samples) > 1:
        longest = tuple(
            max(round_up(max(total)), step_of(sum(total) + 1)) for total in counts.total
        )  # or what fills up
    return Plan(targets, len(request.samples), rows, visual, longest), counts


@dataclass(frozen=True)
class Inputs:
    """What a request brings to the program of its bucket.

    Attributes
    ----------
    hidden : Tensor of shape (rows[0], hidden_size)
    cos, sin : Tensor of shape (rows[0], head_dim)
    visual_rows : Tensor of shape (batch, visual[0]), int64
        Packed row of every visual token; tokens that fill up name the last row.
    valid : Tensor of shape (batch, visual[0]), bool
    offsets : Tensor of shape (n_stages, batch + 2), int32
        The last sequence is what fills up.
    n_visual : Tensor of shape (n_stages, batch), int64
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    visual_rows: Tensor
    valid: Tensor
    offsets: Tensor
    n_visual: Tensor


def make_inputs(request: Request, packed: Packed, bucket: Plan, counts: Counts) -> Inputs:
    """Fill a request up to its bucket."""
    device, n_rows = packed.hidden.device, packed.hidden.shape[0]

    def filled(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0, 0, bucket.rows[0] - n_rows))

    visual_rows = torch.full((bucket.batch, bucket.visual[0]), bucket.rows[0] - 1, dtype=torch.int64, device=device)
    for b, sample in enumerate(request.samples):
        visual_rows[b, : sample.alive.shape[0]] = packed.local(b, sample.positions)
    numbers = torch.tensor(counts.visual, dtype=torch.int64)
    ends = torch.tensor(counts.total, dtype=torch.int32).cumsum(dim=1, dtype=torch.int32)
    rooms = torch.tensor(bucket.rows, dtype=torch.int32)[:, None]
    offsets = torch.cat([torch.zeros_like(rooms), ends, rooms], dim=1)
    valid = torch.arange(bucket.visual[0]) < numbers[0][:, None]
    return Inputs(
        filled(packed.hidden), filled(packed.cos), filled(packed.sin), visual_rows, valid.to(device),
        offsets.to(device), numbers.to(device),
    )  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """What the program leaves.

    Attributes
    ----------
    hidden : Tensor of shape (batch, hidden_size)
        Normed, of every sample's last row.
    caches : list of LayerCache
        With the rows that fill up behind.
    kept : list of Tensor
        Per target (batch, visual[stage]): which visual tokens are left, ascending, as indices into those of the prompt;
        the first ``n_visual[stage, b]`` of a row count.
    """

    hidden: Tensor
    caches: list[LayerCache]
    kept: list[Tensor]


def run(view: ModelView, bucket: Plan, selector: SpanSelector, given: Inputs) -> Outputs:
    """The program of a bucket: a fixed list of operations."""
    hidden, cos, sin = given.hidden, given.cos, given.sin
    visual_rows, valid = given.visual_rows, given.valid
    alive = torch.arange(visual_rows.shape[1], device=hidden.device).expand_as(visual_rows)
    caches, kept, stage = [], [], 0
    for layer_idx, layer in enumerate(view.layers):
        offsets, longest = given.offsets[stage], bucket.longest[stage]
        scaling = view.attentions[layer_idx].scaling

        def attend(
            query: Tensor, key: Tensor, value: Tensor, offsets: Tensor = offsets, longest: int = longest,
            scaling: float = scaling,
        ) -> Tensor:  # fmt: skip
            caches.append(LayerCache(key, value, offsets[:-1], longest))
            return varlen_attention(query, key, value, offsets, longest, scaling, causal=True)

        hidden = run_layer(layer, hidden, cos, sin, attend)
        if layer_idx not in bucket.targets:
            continue
        stage += 1
        left, room = given.n_visual[stage], bucket.visual[stage]
        search = dpp_order_by_gram if hidden.is_cuda else dpp_order
        picks = selector.order(hidden[visual_rows], valid, min(room, visual_rows.shape[1]), search)
        chosen = _ascending(picks, left, visual_rows.shape[1])
        rows, visual_rows = _compact(visual_rows, valid, chosen, left, bucket.rows[stage], hidden.shape[0])
        valid = torch.arange(chosen.shape[1], device=hidden.device) < left[:, None]
        alive = alive.gather(1, chosen)
        kept.append(alive)
        hidden, cos, sin = hidden[rows], cos[rows], sin[rows]
    last = hidden[given.offsets[stage][1:-1].long() - 1]
    return Outputs(view.text_model.norm(last), caches, kept)


def _ascending(picks: Tensor, left: Tensor, n: int) -> Tensor:
    """The first ``left[b]`` picks of every sample in the order of the tokens, the others behind."""
    late = torch.arange(picks.shape[1], device=picks.device) >= left[:, None]
    ordered = (picks + late * n).sort(dim=1).values
    return ordered % n


def _compact(
    visual_rows: Tensor, valid: Tensor, chosen: Tensor, left: Tensor, room: int, n_rows: int
) -> tuple[Tensor, Tensor]:
    """Which rows go on, then what fills up, and where the chosen tokens are among them.

    Returns
    -------
    rows : Tensor of shape (room,), int64
    visual_rows : Tensor of shape (batch, n_chosen), int64
    """
    filler = n_rows - 1
    goes_on = torch.ones(n_rows, dtype=torch.bool, device=visual_rows.device)
    goes_on.index_fill_(0, torch.where(valid, visual_rows, filler).flatten(), False)
    counts = torch.arange(chosen.shape[1], device=chosen.device) < left[:, None]
    chosen_rows = visual_rows.gather(1, chosen)
    # Rows of tokens that do not count are written to one place behind the end.
    flags = torch.cat([goes_on, goes_on.new_zeros(1)])
    flags.index_fill_(0, torch.where(counts, chosen_rows, n_rows).flatten(), True)
    rows = torch.argsort(~flags[:n_rows], stable=True)[:room]
    place = flags[:n_rows].cumsum(dim=0) - 1
    return rows, torch.where(counts, place[chosen_rows], room - 1)


def record(request: Request, bucket: Plan, counts: Counts, kept: Sequence[Tensor], n_layers: int) -> None:
    """Bring a request's samples up to date, as the plain path does, without waiting for the device."""
    by_layer = [sum(target < layer_idx for target in bucket.targets) for layer_idx in range(n_layers)]
    for b, sample in enumerate(request.samples):
        assert sample.plan is not None  # of a fixed budget
        sample.layer_tokens += [counts.visual[stage][b] for stage in by_layer]
        for target, n_keep in zip(request.target_layers, sample.plan.counts, strict=True):
            n_in = sample.alive.shape[0]
            skipped = nothing_to_drop(n_in, n_keep, request.config.min_keep)
            if skipped is None:
                stage = bucket.targets.index(target)
                sample.alive = kept[stage][b, : counts.visual[stage + 1][b]]
            record = StageRecord(target, n_in, None, skipped)
            record.kept = sample.alive if n_in else None
            sample.stages.append(record)
