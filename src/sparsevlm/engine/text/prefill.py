"""The prompt: segments of the decoder with prune steps between them, over rows of all samples packed."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ...models import ModelAdapter
from ...request.request import Request
from ...request.step import Readout, choose_embedding_raters, prune_step, reads, reads_text
from ...selection.context import BEFORE_DECODER
from ...selection.padded import draw_seed
from ..call import Prompt
from ..capacities import STEPPED, power_of_two, row_capacity
from ..cuda_graphs import GraphPool
from ..fused_weights import FusedWeights
from ..vision.program import VisionOutput
from .decode_graph import DecodeGraphs
from .embed import PromptPrograms
from .free_choice import choose_freely
from .prune_program import PrunePrograms, PruneShape, PruneStep, visual_capacity
from .readout import read
from .segments import Segment, Segments
from .stages import Choice, TokenCounts, chooses_on_device, is_free, record, text_capacity, text_read
from .workspace import NO_ROOM, PromptInputs, PromptShape, Room, Workspace, n_integers

# Room for text that is read, of every prompt at least: it is copied, but nothing is computed with it.
_PROMPT_TEXT = 256


@dataclass
class PackedRows:
    """Where the tokens of every sample are, one sample behind the other.

    Attributes
    ----------
    positions : list of Tensor
        Per sample, the position within the padded sequence of each of its rows, ascending.
    q_len : int
        Positions of the padded sequence.
    """

    positions: list[Tensor]
    q_len: int

    @classmethod
    def of(cls, request: Request) -> PackedRows:
        """Rows of what is left of a request."""
        return cls([sample.all_positions for sample in request.samples], request.q_len)

    @functools.cached_property
    def _rows(self) -> list[Tensor]:
        """Packed row by position, of every sample."""
        all_rows = []
        for start, own in zip(self.starts, self.positions, strict=False):
            rows = torch.zeros(self.q_len, dtype=torch.int64, device=own.device)
            rows[own] = torch.arange(start, start + own.shape[0], device=own.device)
            all_rows.append(rows)
        return all_rows

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
        return self._rows[sample_idx][positions]


class Prefill:
    """Runs prompts.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    decode_graphs : DecodeGraphs
        Stand over the same workspace, and go with it.

    Attributes
    ----------
    space : Workspace or None
        Holds the last prompt's keys and values.
    """

    def __init__(
        self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool, decode_graphs: DecodeGraphs
    ) -> None:
        self._adapter, self._weights, self._pool, self._decode_graphs = adapter, weights, pool, decode_graphs
        self.space: Workspace | None = None
        self.segments: Segments | None = None
        self.prune_programs: PrunePrograms | None = None
        self.prompts: PromptPrograms | None = None

    def clear(self) -> None:
        """Free everything now: programs refer to what keeps them, so that by themselves they wait for the collector."""
        for programs in (self._decode_graphs, self.segments, self.prune_programs, self.prompts):
            if programs is not None:
                programs.clear()
        self.space = self.segments = self.prune_programs = self.prompts = None

    def make_room(self, rows: int, batch: int, by_layer: tuple[int, ...] | None = None) -> Workspace:
        """The workspace, with programs of its own, made anew where it has no room for a request.

        Parameters
        ----------
        rows, batch, by_layer :
            As in :class:`~.workspace.Room`; ``None``: every layer sees all rows.
        """
        wanted = Room(rows, batch, by_layer or (rows,) * self._adapter.n_layers)
        before = NO_ROOM if self.space is None else self.space.room
        if self.space is None or not before.holds(wanted):
            self.clear()
            self.space = Workspace(self._adapter, self._weights, before.grown(wanted))
            self.segments = Segments(self._adapter, self._weights, self._pool, self.space)
            self.prune_programs = PrunePrograms(self._pool, self.space)
            self.prompts = PromptPrograms(self._adapter, self._pool, self.space)
        return self.space

    def run(self, request: Request, prompt: Prompt, seen: VisionOutput) -> Tensor:
        """Run a prompt.

        Parameters
        ----------
        request : Request
            Its samples are on the host; they and its records are brought up to date.
        prompt : Prompt
        seen : VisionOutput
            Of the tower.

        Returns
        -------
        Tensor of shape (batch, vocab_size)
            Logits of every sample's last row; overwritten by the next call.
        """
        is_on_device = chooses_on_device(request, self._adapter)
        targets = request.target_layers
        if not is_on_device:
            if {"features", "text_features"} & request.traits.needs:
                request.see_embeddings(prompt.embeddings(self._adapter, seen.tokens))
            if seen.rows is not None:
                request.see_vision(prompt.vision_rows(request, seen.rows, seen.tokens.device))
            if is_free(request):
                prompt, seen = choose_freely(self._adapter, request, prompt, seen)
                targets = ()
        features, packed = seen.tokens, PackedRows.of(request)
        counts = TokenCounts.of(request) if is_on_device else None
        shape = _shape(request, packed, counts is not None)
        by_stage = [shape.rows] if counts is None else _rows_by_stage(request, shape, counts)
        by_layer = None
        if counts is not None and not counts.is_free:
            by_layer = counts.by_layer(by_stage, self._adapter.n_layers)
        space = self.make_room(max(shape.rows, features.shape[0]), shape.batch, by_layer)
        assert self.prompts is not None
        integers = torch.zeros(n_integers(shape, space.n_axes), dtype=torch.int64, pin_memory=space.integers.is_cuda)
        fill(PromptInputs.of(shape, space.n_axes, integers), request, prompt, packed, counts)
        space.integers[: integers.shape[0]].copy_(integers, non_blocking=True)
        # All that the tower gave is taken before another program runs, which may have its memory.
        space.features[: features.shape[0]].copy_(features)
        if seen.late:
            space.place_late(seen.late, PromptInputs.of(shape, space.n_axes, space.integers).feature_rows)
        if counts is not None:
            space.take_readings(seen.rows)
        self.prompts.run(shape, bool(shape.n_text) and request.config.raters == "embedding")
        if counts is not None:
            return self._on_device(request, shape, counts, by_stage)[: request.batch]
        logits = self._on_host(request, shape, targets)
        request.forget_embeddings()
        request.count_cache(_cache_bytes(request, space.bytes_per_row, self._adapter.n_layers))
        return logits[: request.batch]

    def _on_device(self, request: Request, shape: PromptShape, counts: TokenCounts, by_stage: list[int]) -> Tensor:
        """Choices wait for nothing but, where the selector says how many tokens go on, for that number; ``by_stage``
        are the capacities of rows."""
        assert self.segments is not None
        assert self.prune_programs is not None
        assert self.space is not None
        n_layers, others = self._adapter.n_layers, [sample.other.shape[0] for sample in request.samples]
        n_text = min(shape.n_text, text_capacity(request))
        # Few rows are all as good as visual tokens: so there are hardly more programs than capacities of rows.
        is_small = shape.rows <= STEPPED
        n_visual = (
            shape.n_visual if is_small else min(shape.n_visual, visual_capacity(max(counts.most[0]), shape.batch))
        )
        first, logits = 0, None
        packed: list[tuple[Tensor, int]] = []
        reads = request.traits.needs or counts.by_rank
        for stage, stop in enumerate((*(target + 1 for target in counts.targets), n_layers)):
            rows, most = by_stage[stage], [n + other for n, other in zip(counts.most[stage], others, strict=True)]
            n_filled = sum(counts.least[stage]) + sum(others)
            is_read = bool(reads) and stop < n_layers
            if stop > first:
                logits = self.segments.run(_segment((first, stop), rows, shape.batch, most, n_filled, is_read))
            if stop < n_layers:
                most_left = n_visual if counts.is_free else max(counts.most[stage + 1])
                room = min(power_of_two(rows), self.space.room.rows)
                prune = PruneShape.of(room, shape.batch, n_visual, most_left, n_text, request, counts.by_rank)
                scaling = self._weights.blocks[stop - 1].scaling if stop else 0.0
                step = PruneStep.of(request, prune, stop - 1, scaling, counts, len(self.space.late))
                packed.append((self.prune_programs.run(request.selector, step, stop - 1).clone(), prune.n_keep))
                if counts.is_free:
                    packed[-1] = packed[-1][0].cpu(), prune.n_keep
                    choice = Choice.of(packed[-1][0], shape.batch, prune.n_keep, n_text)
                    counts = counts.told(choice.n_visual[: request.batch].tolist())
                    by_stage = _rows_by_stage(request, shape, counts)
                first, n_visual = stop, prune.n_keep
        bytes_per_row = self.space.bytes_per_row

        def settle() -> None:
            choices = [Choice.of(one.cpu(), shape.batch, n_keep, n_text) for one, n_keep in packed]
            record(request, counts, choices, n_layers)
            request.count_cache(_cache_bytes(request, bytes_per_row, n_layers))

        request.settle_later(settle)
        assert logits is not None
        return logits

    def _on_host(self, request: Request, shape: PromptShape, targets: tuple[int, ...]) -> Tensor:
        """Choices by the prune step that the hooks take as well, behind the layers that are left of the targets."""
        space, logits = self.space, None
        assert self.segments is not None
        assert space is not None
        request.to(space.hidden.device)
        packed = PackedRows.of(request)
        choose_embedding_raters(request, functools.partial(_rows_of, space, packed))
        n_layers, first, rows = self._adapter.n_layers, 0, shape.rows
        for stop in (*(target + 1 for target in targets), n_layers):
            is_target = stop - 1 in targets
            sizes = [own.shape[0] for own in packed.positions]
            if stop > first:
                segment = _segment((first, stop), rows, shape.batch, sizes, sum(sizes), is_target and reads(request))
                logits = self.segments.run(segment)
            for sample in request.samples * (stop - first):
                sample.enter_layer()
            if is_target:
                scaling = self._weights.blocks[stop - 1].scaling if stop else 0.0
                packed = prune(request, space, packed, stop - 1, scaling, shape.batch)
                rows = min(rows, row_capacity(packed.n_rows + 1))
            first = stop
        assert logits is not None
        return logits


def _rows_of(space: Workspace, packed: PackedRows, sample_idx: int, positions: Tensor) -> Tensor:
    return space.hidden[packed.local(sample_idx, positions)]


def _shape(request: Request, packed: PackedRows, is_on_device: bool) -> PromptShape:
    batch = power_of_two(request.batch)
    rows = row_capacity(packed.n_rows + 1)  # one row of padding at least
    most = max(sample.alive.shape[0] for sample in request.samples)
    n_visual = rows if batch == 1 else min(rows, visual_capacity(most, batch))  # nearly all rows are visual tokens
    n_text = 0
    if is_on_device and (reads_text(request) or "text_features" in request.traits.needs):
        n_text = max(_PROMPT_TEXT, text_capacity(request))
    is_before = is_on_device and request.traits.placement == BEFORE_DECODER
    return PromptShape(rows, batch, n_visual, min(rows, n_text), is_before)


def _rows_by_stage(request: Request, shape: PromptShape, counts: TokenCounts) -> list[int]:
    """Capacities of the rows before the first target that may drop something, and after each."""
    n_other, by_stage = sum(sample.other.shape[0] for sample in request.samples), [shape.rows]
    for most in counts.most[1:]:
        by_stage.append(min(by_stage[-1], row_capacity(sum(most) + n_other + 1)))
    return by_stage


def _segment(layers: tuple[int, int], rows: int, batch: int, sizes: list[int], n_filled: int, is_read: bool) -> Segment:
    """With the capacities of samples of these sizes at most; what fills up behind ``n_filled`` rows at least is a
    sequence as well."""
    max_seqlen = rows if batch == 1 else min(rows, power_of_two(max(*sizes, rows - n_filled)))
    return Segment(*layers, rows, batch, max_seqlen, is_read)


def _cache_bytes(request: Request, bytes_per_row: int, n_layers: int) -> tuple[int, int]:
    """Bytes of a prompt's keys and values, as they would be dense, padding included, and as they are."""
    rows = sum(sum(sample.layer_tokens) + n_layers * sample.other.shape[0] for sample in request.samples)
    return bytes_per_row * n_layers * request.batch * request.q_len, bytes_per_row * rows


def fill(given: PromptInputs, request: Request, prompt: Prompt, packed: PackedRows, counts: TokenCounts | None) -> None:
    """Write down what a prompt brings, on the host; what is written to must be 0."""
    # Arrays: of so few numbers, operations of torch take ten times as long.
    to = SimpleNamespace(**{name: part.numpy() for name, part in vars(given).items()})
    ids, positions, feature_rows = (own.numpy() for own in (prompt.ids, prompt.positions, prompt.feature_rows))
    to.feature_rows[:] = -1
    starts = packed.starts
    to.cu_seqlens[: len(starts)], to.cu_seqlens[len(starts) :] = starts, starts[-1]
    for b, (sample, left) in enumerate(zip(request.samples, packed.positions, strict=True)):
        own, n_visual, rows = left.numpy(), sample.alive.shape[0], slice(starts[b], starts[b + 1])
        to.ids[rows], to.positions[:, rows] = ids[b, own], positions[:, b, own]
        to.feature_rows[rows] = feature_rows[b, own]
        row_of = np.zeros(request.q_len, dtype=np.int64)
        row_of[own] = np.arange(starts[b], starts[b + 1])
        to.n_visual[b] = n_visual
        to.visual_rows[b, :n_visual] = row_of[sample.positions.numpy()]
        if len(sample.image_sizes) > 1:
            to.image_idx[b, :n_visual] = sample.image_idx.numpy()
            to.min_keep_per_image[b] = request.config.min_keep_per_image
        if to.text_rows.shape[1] and n_visual:
            text = text_read(request, sample).numpy()
            to.n_text[b] = text.size
            to.text_rows[b, : text.size] = row_of[text]
        if to.coordinates.size:
            to.coordinates[b, :, :n_visual] = sample.coordinates_on(sample.alive.device).numpy()
    if counts is None:
        return
    for stage, target in enumerate(counts.targets):
        to.counts[stage, : request.batch] = counts.asked[stage]
        if request.traits.draws:
            to.seeds[stage, : request.batch] = [draw_seed(request.config.seed, target, b) for b in range(request.batch)]


def prune(
    request: Request, space: Workspace, packed: PackedRows, target: int, scaling: float, batch: int
) -> PackedRows:
    """Decide for every sample what goes on, and gather it."""
    readout = Readout() if target < 0 else read(request, space, packed, target, scaling)
    readout.vision = request.vision
    visual = [packed.local(b, sample.positions) for b, sample in enumerate(request.samples)]
    survivors = prune_step(request, target, lambda b: space.hidden[visual[b]], readout)
    if survivors is None:
        return packed
    for b, kept in enumerate(survivors):
        if kept.merges:
            for rows in (space.hidden, *space.late):
                rows[packed.local(b, kept.after)] = kept.merged(rows[visual[b]])
    left = PackedRows.of(request)
    space.gather(torch.cat([packed.local(b, own) for b, own in enumerate(left.positions)]))
    space.begin_stage(left.starts, batch)
    return left
