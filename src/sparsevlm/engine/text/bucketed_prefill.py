"""The prompt of a bucket: every shape fixed, every choice made on the device, nothing waited for.

What :mod:`.prefill` does with exact numbers of rows is done here with room for a little more: rows that fill up form a
sequence of their own behind the samples, tokens that fill up come last in every choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import equal_attention, varlen_attention
from ...kernels.elementwise import rotate_into
from ...models import ModelAdapter
from ...request.request import Request, StageRecord
from ...selection.budget import nothing_to_drop
from ...selection.context import OrderedSelector
from ...selection.image_floor import choose_by_order
from ..call import Prompt, to_device
from ..cuda_graphs import round_up, step_of
from ..fused_weights import FusedWeights
from .layer import Attend, run_layer, summed
from .prefill import LayerCache

_CLOSE = torch.contiguous_format


@dataclass(frozen=True)
class BucketShape:
    """Capacities of a bucket's program; requests of equal shapes share it.

    Attributes
    ----------
    targets : tuple of int
        Target layers at which some sample drops tokens.
    batch : int
    rows : tuple of int
        Room for rows before the first and after each of ``targets``.
    visual : tuple of int
        Room for visual tokens of one sample, likewise.
    max_seqlen : tuple of int
        Room for the longest sample, likewise.
    n_images : int
        Room for images of one sample, if some sample has several with a floor each; else 0.
    """

    targets: tuple[int, ...]
    batch: int
    rows: tuple[int, ...]
    visual: tuple[int, ...]
    max_seqlen: tuple[int, ...]
    n_images: int = 0

    @property
    def n_features(self) -> int:
        """Room for rows of the vision tower."""
        return self.batch * self.visual[0]


@dataclass(frozen=True)
class TokenCounts:
    """The numbers of one request, by stage (before the first target and after each) and sample."""

    visual: list[list[int]]
    total: list[list[int]]


def count(request: Request) -> tuple[tuple[int, ...], TokenCounts]:
    """Counts the tokens at each target that drops something; fixed budgets tell it beforehand."""
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
    return tuple(targets), TokenCounts(visual, total)


def plan(request: Request) -> tuple[BucketShape, TokenCounts]:
    """The bucket of a request."""
    targets, counts = count(request)
    rows = tuple(round_up(sum(total) + 1) for total in counts.total)  # one filler at least
    visual = tuple(max(1, round_up(max(numbers))) for numbers in counts.visual)
    max_seqlen = rows
    if len(request.samples) > 1:
        max_seqlen = tuple(
            max(round_up(max(total)), step_of(sum(total) + 1)) for total in counts.total
        )  # or what fills up
    n_images = _n_images(request) if targets else 0
    return BucketShape(targets, len(request.samples), rows, visual, max_seqlen, n_images), counts


def _n_images(request: Request) -> int:
    """Room for images: a power of two, so that prompts of about as many share a program."""
    most = max(len(sample.image_sizes) for sample in request.samples)
    return 1 << (most - 1).bit_length() if most > 1 and request.config.min_keep_per_image else 0


@dataclass(frozen=True)
class Inputs:
    """Inputs of a bucket's program.

    Attributes
    ----------
    ids : Tensor of shape (rows[0],), int64
    positions : Tensor of shape (3, rows[0]), int64
    visual_rows, feature_rows : Tensor of shape (batch, visual[0]), int64
        Packed row of every visual token, and its row of ``features``; tokens that fill up name the last row.
    cu_seqlens : Tensor of shape (n_stages, batch + 2), int64
        The last sequence is what fills up.
    n_visual : Tensor of shape (n_stages, batch), int64
    image_idx : Tensor of shape (batch, visual[0]), int64
        Image of every visual token; empty without floors.
    min_keep : Tensor of shape (batch,), int64
        Floor of each image of a sample, 0 where there is one alone; empty without floors.
    features : Tensor of shape (batch · visual[0], hidden_size)
    """

    ids: Tensor
    positions: Tensor
    visual_rows: Tensor
    feature_rows: Tensor
    cu_seqlens: Tensor
    n_visual: Tensor
    image_idx: Tensor
    min_keep: Tensor
    features: Tensor

    @classmethod
    def of(cls, bucket: BucketShape, integers: Tensor, features: Tensor) -> Inputs:
        """As parts of one tensor, which crosses to the device in one copy."""
        shapes = _shapes(bucket)
        parts = integers.split([math.prod(shape) for shape in shapes])
        ids, positions, visual_rows, feature_rows, cu_seqlens, n_visual, image_idx, min_keep = (
            part.view(shape) for part, shape in zip(parts, shapes, strict=True)
        )
        return cls(ids, positions, visual_rows, feature_rows, cu_seqlens, n_visual, image_idx, min_keep, features)


def _shapes(bucket: BucketShape) -> list[tuple[int, ...]]:
    rows, tokens, n_stages = bucket.rows[0], (bucket.batch, bucket.visual[0]), len(bucket.rows)
    of_images = (tokens, (bucket.batch,)) if bucket.n_images else ((0,), (0,))
    return [(rows,), (3, rows), tokens, tokens, (n_stages, bucket.batch + 2), (n_stages, bucket.batch), *of_images]


def n_integers(bucket: BucketShape) -> int:
    """Integers of one request."""
    return sum(math.prod(shape) for shape in _shapes(bucket))


def make_integers(request: Request, prompt: Prompt, bucket: BucketShape, counts: TokenCounts) -> Tensor:
    """All of :class:`Inputs` but the features, on the host, filled up to the bucket."""
    integers = torch.zeros(n_integers(bucket), dtype=torch.int64, device="cpu")
    given = Inputs.of(bucket, integers, integers)
    given.visual_rows.fill_(bucket.rows[0] - 1)
    start = 0
    for b, sample in enumerate(request.samples):
        visual = sample.positions
        own, _ = torch.cat([sample.other, visual]).sort()
        rows = slice(start, start + own.shape[0])
        given.ids[rows] = prompt.ids[b, own]
        given.positions[:, rows] = prompt.positions[:, b, own]
        given.visual_rows[b, : visual.shape[0]] = start + torch.searchsorted(own, visual)
        given.feature_rows[b, : visual.shape[0]] = prompt.feature_rows[b, visual]
        if bucket.n_images:
            given.image_idx[b, : visual.shape[0]] = sample.image_idx
            given.min_keep[b] = request.config.min_keep_per_image if len(sample.image_sizes) > 1 else 0
        start = rows.stop
    given.n_visual.copy_(torch.tensor(counts.visual))
    given.cu_seqlens[:, 1:-1] = torch.tensor(counts.total).cumsum(dim=1)
    given.cu_seqlens[:, -1] = torch.tensor(bucket.rows)
    return integers


@dataclass(frozen=True)
class Outputs:
    """Outputs of a bucket's program.

    Attributes
    ----------
    logits : Tensor of shape (batch, vocab_size)
        Of every sample's last row.
    caches : list of LayerCache
        With the rows that fill up behind.
    kept : list of Tensor
        Per target (batch, visual[stage]): which visual tokens are left, ascending, as indices into those of the prompt;
        the first ``n_visual[stage, b]`` of a row count.
    """

    logits: Tensor
    caches: list[LayerCache]
    kept: list[Tensor]


def run(
    adapter: ModelAdapter, weights: FusedWeights, bucket: BucketShape, selector: OrderedSelector, given: Inputs
) -> Outputs:
    """The program of a bucket: a fixed list of operations."""
    hidden = adapter.decoder.embed(given.ids)
    images = given.features[given.feature_rows.flatten()].to(hidden.dtype)
    hidden = hidden.index_copy(0, given.visual_rows.flatten(), images)
    cos, sin = (table[0] for table in adapter.decoder.rotary(hidden[None], given.positions[:, None]))
    visual_rows, cu_seqlens = given.visual_rows, given.cu_seqlens.to(torch.int32)
    everyone = torch.arange(bucket.visual[0], device=hidden.device)
    alive, valid = everyone.expand_as(visual_rows), everyone < given.n_visual[0][:, None]
    image_idx = given.image_idx
    caches: list[LayerCache] = []
    kept: list[Tensor] = []
    residual: Tensor | None = None
    stage = 0
    for layer_idx, block in enumerate(weights.blocks):
        attend = _attention(caches, cos, sin, cu_seqlens[stage], bucket.max_seqlen[stage], block.scaling)
        hidden, residual = run_layer(block, weights, hidden, residual, attend)
        if layer_idx not in bucket.targets:
            continue
        hidden, residual = summed(hidden, residual), None
        stage += 1
        left, capacity = given.n_visual[stage], bucket.visual[stage]
        picks = selector.order(hidden[visual_rows], valid, min(capacity, visual_rows.shape[1]))
        if bucket.n_images:
            is_chosen = choose_by_order(picks, image_idx, valid, left, given.min_keep, bucket.n_images)
            chosen = _places(is_chosen, picks.shape[1])
            image_idx = image_idx.gather(1, chosen)
        else:
            chosen = _ascending(picks, left, visual_rows.shape[1])
        rows, visual_rows = _compact(visual_rows, valid, chosen, left, bucket.rows[stage], hidden.shape[0])
        valid = torch.arange(chosen.shape[1], device=hidden.device) < left[:, None]
        alive = alive.gather(1, chosen)
        kept.append(alive)
        hidden, cos, sin = hidden[rows], cos[rows], sin[rows]
    last = summed(hidden, residual)[cu_seqlens[stage][1:-1].long() - 1]
    return Outputs(adapter.decoder.head(adapter.decoder.norm(last)), caches, kept)


def _attention(
    caches: list[LayerCache], cos: Tensor, sin: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float
) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = torch.empty_like(key, memory_format=_CLOSE), torch.empty_like(value, memory_format=_CLOSE)
        query = rotate_into(query, key, value, cos, sin, keys, values)
        caches.append(LayerCache(keys, values, cu_seqlens[:-1], max_seqlen))
        if cu_seqlens.shape[0] == 3:  # one sample, which does not see what fills up behind it
            return equal_attention(query, keys, values, query.shape[0], scaling, causal=True)
        return varlen_attention(query, keys, values, cu_seqlens, max_seqlen, scaling, causal=True)

    return attend


def _ascending(picks: Tensor, left: Tensor, n: int) -> Tensor:
    """The first ``left[b]`` picks of every sample in the order of the tokens, the others behind."""
    late = torch.arange(picks.shape[1], device=picks.device) >= left[:, None]
    ordered = (picks + late * n).sort(dim=1).values
    return ordered % n


def _places(is_chosen: Tensor, capacity: int) -> Tensor:
    """Where a mask is true, ascending, others behind: of shape (batch, capacity)."""
    return torch.argsort(~is_chosen, dim=1, stable=True)[:, :capacity]


def _compact(
    visual_rows: Tensor, valid: Tensor, chosen: Tensor, left: Tensor, capacity: int, n_rows: int
) -> tuple[Tensor, Tensor]:
    """Finds the rows that go on, then the padding, and where the chosen tokens are among them.

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
    rows = torch.argsort(~flags[:n_rows], stable=True)[:capacity]
    place = flags[:n_rows].cumsum(dim=0) - 1
    return rows, torch.where(counts, place[chosen_rows], capacity - 1)


def record(request: Request, bucket: BucketShape, counts: TokenCounts, kept: Sequence[Tensor], n_layers: int) -> None:
    """Bring a request's samples up to date, as a prune step does, without waiting for the device."""
    by_layer = [sum(target < layer_idx for target in bucket.targets) for layer_idx in range(n_layers)]
    for b, sample in enumerate(request.samples):
        assert sample.plan is not None  # of a fixed budget
        n_first = sample.alive.shape[0]
        first = to_device(sample.alive, kept[0].device) if kept and n_first < sample.visual.shape[0] else None
        for stage in by_layer:
            sample.enter_layer(counts.visual[stage][b])
        for target, n_keep in zip(request.target_layers, sample.plan.counts, strict=True):
            n_in = sample.alive.shape[0]
            skipped = nothing_to_drop(n_in, n_keep, request.config.min_keep)
            if skipped is None:
                stage = bucket.targets.index(target)
                left = kept[stage][b, : counts.visual[stage + 1][b]]
                sample.keep_only(left if first is None else first[left])
            sample.add_stage(StageRecord(target, n_in, None, skipped, kept=sample.alive if n_in else None))
