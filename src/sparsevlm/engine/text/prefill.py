"""The prompt: segments of the decoder with prune steps between them, over rows of all samples packed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models import ModelAdapter
from ...request.request import Request
from ...request.step import Readout, choose_embedding_raters, prune_step, reads, reads_text
from ...selection.context import OrderedSelector
from ..call import Prompt
from ..capacities import power_of_two, row_capacity
from ..cuda_graphs import GraphPool
from ..fused_weights import FusedWeights
from .prune_program import PrunePrograms, PruneShape, TokenCounts, chooses_on_device, record, visual_capacity
from .readout import read
from .segments import Segment, Segments
from .workspace import PromptInputs, PromptShape, Workspace, n_integers, workspace_size


@dataclass
class PackedRows:
    """Where the tokens of every sample are, one sample behind the other.

    Attributes
    ----------
    positions : list of Tensor
        Per sample, the position within the padded sequence of each of its rows, ascending.
    """

    positions: list[Tensor]

    @property
    def starts(self) -> list[int]:
        """First row of every sample, and the number of all rows."""
        starts = [0]
        for rows in self.positions:
            starts.append(starts[-1] + rows.shape[0])
        return starts

    @property
    def n_rows(self) -> int:
        """Rows of all samples."""
        return self.starts[-1]

    @property
    def longest(self) -> int:
        """Rows of the longest sample."""
        return max(rows.shape[0] for rows in self.positions)

    def local(self, sample_idx: int, positions: Tensor) -> Tensor:
        """Packed rows of tokens of one sample."""
        return self.starts[sample_idx] + torch.searchsorted(self.positions[sample_idx], positions)


class Prefill:
    """Runs prompts.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool

    Attributes
    ----------
    space : Workspace or None
        Holds the last prompt's keys and values.
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool) -> None:
        self._adapter, self._weights, self._pool = adapter, weights, pool
        self.space: Workspace | None = None
        self.segments: Segments | None = None
        self.prune_programs: PrunePrograms | None = None

    def clear(self) -> None:
        """Free everything."""
        self.space = self.segments = self.prune_programs = None

    def make_room(self, rows: int, batch: int) -> Workspace:
        """The workspace, with programs of its own, made anew where it has no room for a request."""
        if self.space is None or not self.space.holds(rows, batch):
            before = (0, 0) if self.space is None else (self.space.rows, self.space.batch)
            self.clear()
            rows, batch = workspace_size(rows, batch, *before)
            self.space = Workspace(self._adapter, self._weights, rows, batch)
            self.segments = Segments(self._adapter, self._weights, self._pool, self.space)
            self.prune_programs = PrunePrograms(self._pool, self.space)
        return self.space

    def run(self, request: Request, prompt: Prompt, features: Tensor) -> Tensor:
        """Run a prompt.

        Parameters
        ----------
        request : Request
            Its samples are on the host; they and its records are brought up to date.
        prompt : Prompt
        features : Tensor of shape (n_features, hidden_size)

        Returns
        -------
        Tensor of shape (batch, vocab_size)
            Logits of every sample's last row; overwritten by the next call.
        """
        packed = PackedRows([sample.all_positions for sample in request.samples])
        shape = self._shape(request, packed)
        space = self.make_room(max(shape.rows, features.shape[0]), shape.batch)
        counts = TokenCounts.of(request) if chooses_on_device(request) else None
        integers = torch.zeros(n_integers(shape, space.n_axes), dtype=torch.int64, pin_memory=space.integers.is_cuda)
        fill(PromptInputs.of(shape, space.n_axes, integers), request, prompt, packed, counts)
        space.integers[: integers.shape[0]].copy_(integers, non_blocking=True)
        space.features[: features.shape[0]].copy_(features)
        if counts is not None:
            return self._on_device(request, shape, counts)[: request.batch]
        if {"features", "text_features"} & request.traits.needs:
            request.see_embeddings(prompt.embeddings(self._adapter, features))
        logits = self._on_host(request, shape)
        request.forget_embeddings()
        return logits[: request.batch]

    @staticmethod
    def _shape(request: Request, packed: PackedRows) -> PromptShape:
        batch = power_of_two(request.batch)
        rows = row_capacity(packed.n_rows + 1)  # one row of padding at least
        most = max(sample.alive.shape[0] for sample in request.samples)
        return PromptShape(rows, batch, visual_capacity(most, batch))

    def _on_device(self, request: Request, shape: PromptShape, counts: TokenCounts) -> Tensor:
        """Choices wait for nothing."""
        assert self.segments is not None
        assert self.prune_programs is not None
        assert isinstance(request.selector, OrderedSelector)
        n_layers, others = self._adapter.n_layers, [sample.other.shape[0] for sample in request.samples]
        first, n_visual, rows, kept, logits = 0, shape.n_visual, shape.rows, [], None
        for stage, stop in enumerate((*(target + 1 for target in counts.targets), n_layers)):
            sizes = [n + other for n, other in zip(counts.visual[stage], others, strict=True)]
            logits = self.segments.run(_segment((first, stop), rows, shape, sizes, stage == 0))
            if stop < n_layers:
                prune = PruneShape.of(rows, shape, n_visual, max(counts.visual[stage + 1]), request)
                kept.append(self.prune_programs.run(request.selector, prune).clone())
                left = sum(counts.visual[stage + 1]) + sum(others)
                first, n_visual, rows = stop, prune.n_keep, min(rows, row_capacity(left + 1))
        record(request, counts, kept, n_layers)
        assert logits is not None
        return logits

    def _on_host(self, request: Request, shape: PromptShape) -> Tensor:
        """Choices by the prune step that the hooks take as well."""
        space, logits = self.space, None
        assert self.segments is not None
        assert space is not None
        request.to(space.hidden.device)
        packed = PackedRows([sample.all_positions for sample in request.samples])
        first, rows, begins = 0, shape.rows, True
        for stop, is_target in _stops(request, self._adapter.n_layers):
            sizes = [own.shape[0] for own in packed.positions]
            logits = self.segments.run(
                _segment((first, stop), rows, shape, sizes, begins, is_target and reads(request))
            )
            for sample in request.samples * (stop - first):
                sample.enter_layer()
            if stop == 0:
                choose_embedding_raters(request, functools.partial(_rows_of, space, packed))
            if is_target:
                scaling = self._weights.blocks[stop - 1].scaling if stop else 0.0
                packed = _prune(request, space, packed, stop - 1, scaling, shape.batch)
                rows = min(rows, row_capacity(packed.n_rows + 1))
            first, begins = stop, False
        assert logits is not None
        return logits


def _rows_of(space: Workspace, packed: PackedRows, sample_idx: int, positions: Tensor) -> Tensor:
    return space.hidden[packed.local(sample_idx, positions)]


def _stops(request: Request, n_layers: int) -> Iterator[tuple[int, bool]]:
    """Layers that segments end before, and whether these are prune steps."""
    starts = 0 not in (stops := [target + 1 for target in request.target_layers])
    if starts and request.config.raters == "embedding" and reads_text(request):
        yield 0, False
    for stop in stops:
        yield stop, True
    if n_layers not in stops:
        yield n_layers, False


def _segment(
    layers: tuple[int, int], rows: int, shape: PromptShape, sizes: list[int], begins: bool, is_read: bool = False
) -> Segment:
    """With the capacities of samples of some sizes; the padding behind them is a sequence as well."""
    max_seqlen = rows if shape.batch == 1 else min(rows, power_of_two(max(*sizes, rows - sum(sizes))))
    return Segment(*layers, rows, shape.batch, max_seqlen, shape if begins else None, is_read)


def fill(given: PromptInputs, request: Request, prompt: Prompt, packed: PackedRows, counts: TokenCounts | None) -> None:
    """Write down what a prompt brings, on the host; what is written to must be 0."""
    given.feature_rows.fill_(-1)
    starts = packed.starts
    for b, (sample, own) in enumerate(zip(request.samples, packed.positions, strict=True)):
        rows = slice(starts[b], starts[b + 1])
        given.ids[rows] = prompt.ids[b, own]
        given.positions[:, rows] = prompt.positions[:, b, own]
        given.feature_rows[rows] = prompt.feature_rows[b, own]
        n_visual = sample.alive.shape[0]
        given.visual_rows[b, :n_visual] = packed.local(b, sample.positions)
        given.image_idx[b, :n_visual] = sample.image_idx
        given.min_keep_per_image[b] = request.config.min_keep_per_image if len(sample.image_sizes) > 1 else 0
    given.cu_seqlens[: len(starts)] = torch.tensor(starts)
    given.cu_seqlens[len(starts) :] = starts[-1]
    if counts is not None:
        numbers = torch.tensor(counts.visual)
        given.n_visual[: len(numbers), : request.batch] = numbers


def _prune(
    request: Request, space: Workspace, packed: PackedRows, target: int, scaling: float, batch: int
) -> PackedRows:
    """Decide for every sample what goes on, and gather it."""
    readout = Readout() if target < 0 else read(request, space, packed, target, scaling)
    visual = [packed.local(b, sample.positions) for b, sample in enumerate(request.samples)]
    survivors = prune_step(request, target, lambda b: space.hidden[visual[b]], readout)
    if survivors is None:
        return packed
    for b, kept in enumerate(survivors):
        if kept.merges:
            space.hidden[packed.local(b, kept.after)] = kept.merged(space.hidden[visual[b]])
    left = PackedRows([sample.all_positions for sample in request.samples])
    space.gather(torch.cat([packed.local(b, own) for b, own in enumerate(left.positions)]))
    space.begin_stage(left.starts, batch)
    return left
