"""One request: which tokens are visual, which may vote, what is left, and the record that the report is made of."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..config import SparseVLMConfig
from ..models import Grid, Layout, ModelAdapter, View, as_grid, views
from ..report import StageReport
from ..selection.budget import Plan
from ..selection.context import Selection, Selector, SelectorTraits
from .timing import Clock, Mark

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .step import VisionRows


@dataclass
class Sample:
    """One sample of a pruning forward. Positions count within the forward's sequence, padding included.

    Attributes
    ----------
    visual : Tensor of shape (n_visual,), int64
        Positions of all visual tokens.
    other : Tensor of shape (n_other,), int64
        Positions of all other tokens that are no padding, and of the prompt's last row whatever it is.
    text : Tensor of shape (n_text,), int64
        Positions of all text, template and special tokens left out.
    rater_candidates : Tensor of shape (n_voters,), int64
        The part of the text that may vote: behind the last visual token.
    last : Tensor of shape (1,), int64
        Position of the prompt's last token that is no padding (guesses of assisted decoding are none of it).
    alive : Tensor of shape (n_alive,), int64
        Indices into ``visual`` of what is left.
    tail : int
        Contiguous tokens at the end of the sequence, behind the last visual one.
    layouts : tuple of Layout
        Arrangement of the visual tokens of each image or video, in prompt order; empty: not known.
    plan : Plan or None
        Counts per target layer; ``None``: the rank decides.
    image_sizes : tuple of int
        Visual tokens of each image or video, in prompt order; empty: all of one.
    coordinates : Tensor of shape (3, n_visual), int64, optional
        Time, height and width of all visual tokens.
    clamped : list of str
        What could not hold beside the budget: floors where the rank decided, the share that the vision tower computes.
    """

    visual: Tensor
    other: Tensor
    text: Tensor
    rater_candidates: Tensor
    last: Tensor
    alive: Tensor
    tail: int
    layouts: tuple[Layout, ...] = ()
    plan: Plan | None = None
    embedding_raters: Tensor | None = None
    coordinates: Tensor | None = None
    image_sizes: tuple[int, ...] = ()
    clamped: list[str] = field(default_factory=list)
    stages: list[StageRecord] = field(default_factory=list)
    layer_tokens: list[int] = field(default_factory=list)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grid (t, h, w) of each image or video; empty where one is not known, or is no single grid."""
        grids = tuple(grid for grid in map(as_grid, self.layouts) if grid is not None)
        return grids if len(grids) == len(self.layouts) else ()

    @property
    def views(self) -> tuple[tuple[View, ...], ...]:
        """Views of each image; empty where none has any."""
        found = tuple(map(views, self.layouts))
        return found if any(found) else ()

    @property
    def positions(self) -> Tensor:
        """Positions of the visual tokens that are left."""
        return self.visual[self.alive]

    @property
    def behind(self) -> Tensor:
        """Position of the token right behind the last visual one that is left, or of the prompt's last, (1,)."""
        if not self.alive.shape[0]:
            return self.last
        after = torch.cat([self.other, self.last])
        return after[torch.searchsorted(after, self.positions[-1:], right=True).clamp_max(after.shape[0] - 1)]

    def coordinates_on(self, device: torch.device) -> Tensor:
        """Coordinates of what is left, (3, n_alive)."""
        if self.coordinates is None:
            return self.positions.expand(3, -1)
        return self.coordinates.to(device)[:, self.alive.to(device)]

    @property
    def image_idx(self) -> Tensor:
        """Which image what is left belongs to, (n_alive,)."""
        if len(self.image_sizes) < 2:
            return torch.zeros_like(self.alive)
        sizes = torch.tensor(self.image_sizes, device="cpu")
        return torch.arange(len(sizes), device="cpu").repeat_interleave(sizes).to(self.alive.device)[self.alive]

    @property
    def n_per_image(self) -> list[int]:
        """How many tokens of each image are left; waits for the device where some are gone."""
        if self.alive.shape[0] == self.visual.shape[0]:
            return list(self.image_sizes)
        return torch.bincount(self.image_idx, minlength=len(self.image_sizes)).tolist()

    @property
    def all_positions(self) -> Tensor:
        """Positions of all tokens that are left, ascending."""
        return torch.cat([self.other, self.positions]).sort().values

    def positions_before(self, layer_idx: int) -> Tensor:
        """Positions of all tokens that have reached a layer, ascending, by what was recorded."""
        kept = [stage.kept for stage in self.stages if stage.layer < layer_idx and stage.kept is not None]
        visual = self.visual if not kept else self.visual[kept[-1].to(self.visual.device)]
        return torch.cat([self.other, visual]).sort().values

    def keep(self, keep_idx: Tensor) -> None:
        """Leave out all visual tokens but these, given as indices into what is left."""
        self.alive = self.alive[keep_idx]

    def keep_only(self, alive: Tensor) -> None:
        """Leave out all visual tokens but these, given as indices among all of them."""
        self.alive = alive

    def enter_layer(self, n_visual: int | None = None) -> None:
        """Count the visual tokens at the input of one more layer: what is left, or ``n_visual``."""
        self.layer_tokens.append(self.alive.shape[0] if n_visual is None else n_visual)

    def add_stage(self, record: StageRecord) -> None:
        """Record what was decided at a target layer."""
        self.stages.append(record)

    def to(self, device: torch.device) -> None:
        """Follow the hidden states to another device."""
        if self.alive.device == device:
            return
        for name in ("visual", "other", "text", "rater_candidates", "last", "alive"):
            setattr(self, name, getattr(self, name).to(device))


@dataclass
class StageRecord:
    """Decision for a sample at a target layer; tensors stay on the device until the report is read."""

    layer: int
    n_in: int
    rank: int | None
    skipped_because: str | None
    raters: Tensor | None = None
    kept: Tensor | None = None
    recycled: Tensor | None = None

    def report(self, image_sizes: Sequence[int] = ()) -> StageReport:
        """The printable form, for a sample with images of these sizes."""
        recycled = set() if self.recycled is None else set(self.recycled.tolist())
        gone_on = None if self.kept is None else self.kept.tolist()
        kept = () if gone_on is None else tuple(i for i in gone_on if i not in recycled)
        return StageReport(
            layer=self.layer,
            n_in=self.n_in,
            n_kept=self.n_in if gone_on is None else len(kept),
            n_recycled=len(recycled),
            rank=self.rank,
            raters=() if self.raters is None else tuple(self.raters.tolist()),
            kept=kept,
            recycled=tuple(sorted(recycled)),
            skipped_because=self.skipped_because,
            per_image=_per_image(gone_on, image_sizes),
        )


def _per_image(gone_on: Sequence[int] | None, image_sizes: Sequence[int]) -> tuple[int, ...]:
    """How many of the tokens that have gone on, ascending (``None``: all), are of each image."""
    if gone_on is None:
        return tuple(image_sizes)
    ends = (bisect.bisect_left(gone_on, end) for end in itertools.accumulate(image_sizes, initial=0))
    return tuple(after - before for before, after in itertools.pairwise(ends))


@dataclass
class Request:
    """A forward that may prune, and the decode steps that follow it.

    Attributes
    ----------
    config, selector, traits, target_layers
        What was in force when the request began.
    rows : Tensor of shape (batch, n_rows), int64, or None
        Position of each row that is left in the hidden states, -1 for fillers; ``None``: nothing was dropped yet.
    vision : list of VisionRows
        By sample, what the engine's vision tower told of its visual tokens, while the prompt runs.
    finished : bool
        Whether the first pass is over.
    cache : weak reference, optional
        Cache that the request filled; later passes on it are its decode steps.
    logits_to_keep : int
        Rows at the end that the caller wants logits of; 0: all.
    n_last : int
        Rows at the end that layers without keys of their own compute; 0: all.
    copies : int
        Rows per prompt: beams or returned sequences.
    prompt : Tensor of shape (batch, q_len), int64, or None
        Set where ``generate`` brings the prompt in every step anew, as it does without a cache.
    first : Request or None
        Of such a step, the request that it goes on with: what that one has chosen holds.
    selections : dict
        What was chosen by target layer, for such steps.
    path, path_reason : str
        Which implementation runs, and why.
    failed : str, optional
        The error that the call ended in.
    images_cached : int
        Images and videos that were encoded in earlier calls.
    n_refreshed : int
        Tokens of earlier turns that were prefilled again.
    kept_bytes : int
        Bytes of visual features that are kept with the cache.
    unsettled : callable, optional
        Brings samples and records up to date with what the device has chosen, when somebody asks.
    tp_group : ProcessGroup, optional
        Ranks over which the model is tensor-parallel.
    serial : int
        No other request of this process has the same, not even of those that are gone.
    """

    config: SparseVLMConfig
    selector: Selector
    traits: SelectorTraits
    target_layers: tuple[int, ...]
    q_len: int
    past_len: int
    batch: int
    samples: list[Sample] = field(default_factory=list)
    skipped_because: str | None = None
    n_valid: list[int] = field(default_factory=list)
    rows: Tensor | None = None
    features: Tensor | None = None
    vision: list[VisionRows] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    decode_steps: int = 0
    finished: bool = False
    cache: weakref.ref[Cache] | None = None
    logits_to_keep: int = 0
    n_last: int = 0
    copies: int = 1
    prompt: Tensor | None = None
    first: Request | None = None
    selections: dict[int, list[Selection | None]] = field(default_factory=dict)
    kv_bytes: tuple[int, int] = (0, 0)
    kv_note: str | None = None
    path: str = "plain"
    path_reason: str = "hooks on the model's own modules"
    failed: str | None = None
    images_cached: int = 0
    n_refreshed: int = 0
    kept_bytes: int = 0
    unsettled: Callable[[], None] | None = None
    tp_group: ProcessGroup | None = None
    serial: int = field(default_factory=itertools.count().__next__)

    def begin_prompt(self, samples: list[Sample]) -> None:
        """Take the samples of a prompt with images or videos."""
        self.samples = samples
        self.n_valid = [sample.visual.shape[0] + sample.other.shape[0] for sample in samples]

    def comes_again(self, prompt: Tensor) -> None:
        """Note the prompt, (batch, q_len), of which every step will bring more."""
        self.prompt = prompt

    def continues_in(self, ids: Tensor | None) -> bool:
        """Tells whether tokens, (batch, length), are the prompt with new ones behind it."""
        if self.prompt is None or ids is None or not self.finished or self.failed is not None:
            return False
        return ids.shape[1] > self.q_len and torch.equal(ids[:, : self.q_len], self.prompt)

    def step_without_cache(self, samples: list[Sample], q_len: int) -> Request:
        """A pass over the prompt and the new tokens, which drops what this request has dropped."""
        step = dataclasses.replace(self, first=self, q_len=q_len, rows=None)
        step.begin_prompt(samples)
        for sample, of_prompt in zip(samples, self.samples, strict=True):
            sample.plan = of_prompt.plan
        return step

    def record_selections(self, target: int, selections: list[Selection | None]) -> None:
        """Keep what was chosen at a target layer, if later steps need it."""
        if self.prompt is not None:
            self.selections[target] = selections

    def skip(self, reason: str, n_valid: list[int]) -> None:
        """Note that it is lawfully left dense, and how many tokens its samples hold."""
        self.skipped_because, self.n_valid = reason, n_valid

    def see_positions(self, adapter: ModelAdapter, position_ids: Tensor | None) -> None:
        """Take the coordinates of all visual tokens from the prompt's position ids, (n_axes, batch, q_len) or fewer
        dimensions, and from the grids of the images."""
        n_axes, batched = adapter.decoder.n_position_axes, None
        if position_ids is not None and position_ids.ndim == 3:
            batched = position_ids[-n_axes:].expand(n_axes, self.batch, -1)
        for b, sample in enumerate(self.samples):
            own = None if batched is None else batched[:, b].to(sample.visual.device)
            sample.coordinates = adapter.family.coordinates(sample.layouts, own, sample.visual)

    def see_embeddings(self, embeds: Tensor) -> None:
        """Take the prompt's embeddings, (batch, q_len, hidden_size), where the selector needs them."""
        if {"features", "text_features"} & self.traits.needs:
            self.features = embeds

    def see_vision(self, rows: list[VisionRows]) -> None:
        """Take what the vision tower told of all visual tokens of every sample."""
        self.vision = rows

    def forget_embeddings(self) -> None:
        """Drop what only the prompt needs."""
        self.features, self.vision = None, []

    def compute_last(self, n_rows: int) -> None:
        """Note how many rows layers without keys of their own compute; 0: all."""
        self.n_last = n_rows

    def place(self, rows: Tensor) -> None:
        """Take the position of each row that is left in the hidden states, (batch, n_rows); -1: a filler."""
        self.rows = rows

    def finish(self, cache: Cache | None, kv_bytes: tuple[int, int] = (0, 0), kv_note: str | None = None) -> None:
        """End the prompt; ``cache`` holds it from now on."""
        if cache is not None:
            self.cache = weakref.ref(cache)
        self.kv_note, self.finished = kv_note, True
        self.count_cache(kv_bytes)

    def count_cache(self, kv_bytes: tuple[int, int]) -> None:
        """Note the bytes of the prompt's keys and values, as they would be dense and as they are."""
        self.kv_bytes = kv_bytes

    def settle_later(self, bring_up_to_date: Callable[[], None]) -> None:
        """Leave samples and records as they are until somebody asks: what they have to say is on the device."""
        self.unsettled = bring_up_to_date

    def settle(self) -> None:
        """Bring samples and records up to date; waits for the device."""
        if self.unsettled is not None:
            bring_up_to_date, self.unsettled = self.unsettled, None
            bring_up_to_date()

    def run_on(self, path: str, reason: str) -> None:
        """Note which implementation runs it, and why."""
        self.path, self.path_reason = path, reason

    def remark(self, remark: str) -> None:
        """Add to the reason what it does not say yet."""
        if remark not in self.path_reason:
            self.path_reason += remark

    def note_tower(self, n_cached: int | None, apart: str | None) -> None:
        """Note how the vision tower ran.

        Parameters
        ----------
        n_cached : int or None
            Images that were encoded in earlier calls; ``None``: nobody looked for them.
        apart : str or None
            Why its own modules ran one by one, where they could have been recorded.
        """
        if apart is not None:
            self.remark(f"; the tower ran module by module: {apart}")
        if not self.config.image_cache:
            return
        self.images_cached = n_cached or 0
        if n_cached is None:
            self.remark(
                "; image_cache was not asked: vision_keep, encoded images, a selector that looks into the tower, or a "
                "tower by its own modules"
            )

    def count_refreshed(self, n_tokens: int) -> None:
        """Note how many tokens of earlier turns were prefilled again."""
        self.n_refreshed = n_tokens

    def count_kept(self, n_bytes: int) -> None:
        """Note how many bytes of visual features are kept with the cache."""
        self.kept_bytes = n_bytes

    def goes_on(self, path: str) -> None:
        """Note the path that a later turn runs on, if it is another."""
        if path != self.path:
            self.remark(f"; a later turn on the path {path}")

    def clamp(self, sample: Sample, reason: str) -> None:
        """Note that a floor of a sample, or what a floor was put in the place of, could not hold.

        Raises
        ------
        ValueError
            With ``strict``.
        """
        if self.config.strict:
            raise ValueError(f"{reason} (strict=True refuses this).")
        sample.clamped.append(reason)

    def begin_decode_step(self) -> None:
        """Count one more new token of every sample."""
        self.decode_steps += 1

    def add_time(self, phase: str, begin: Mark, end: Mark) -> None:
        """Book the time of a part of the work: ``"vision"``, ``"prefill"``, ``"pruning"`` or ``"decode"``."""
        self.clock.add(phase, begin, end)

    def fail(self, error: BaseException) -> None:
        """Note that the call ended in an error."""
        self.failed = ": ".join(filter(None, (type(error).__name__, str(error))))
        self.forget_embeddings()

    def fills(self, cache: Cache | None) -> bool:
        """Tells whether ``cache`` is the one that this request filled (it may have been reset since)."""
        return cache is not None and self.cache is not None and self.cache() is cache

    def to(self, device: torch.device) -> None:
        """Follow the hidden states to another device (layers may be spread over several)."""
        if self.samples and self.samples[0].alive.device != device:
            for sample in self.samples:
                sample.to(device)
            if self.rows is not None:
                self.rows = self.rows.to(device)

    def keeps_all(self, target: int) -> bool:
        """Tells whether the budgets are known to drop nothing at a target layer."""
        stage = self.target_layers.index(target)
        return all(
            sample.alive.shape[0] <= self.config.min_keep
            or (sample.plan is not None and sample.plan.counts[stage] >= sample.alive.shape[0])
            for sample in self.samples
        )

    @property
    def drops_nothing(self) -> bool:
        """Tells whether the budgets are known to drop nothing at all."""
        return all(self.keeps_all(target) for target in self.target_layers)

    def local_rows(self, sample_idx: int, positions: Tensor) -> Tensor:
        """Finds the rows, among those that are left, of tokens at given positions."""
        if self.rows is None:
            return positions
        return torch.searchsorted(self.rows[sample_idx], positions)
