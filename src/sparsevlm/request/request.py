"""One request: which tokens are visual, which may vote, what is left, and the record that the report is made of."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..config import SparseVLMConfig
from ..error_notes import with_notes
from ..models import ModelAdapter
from ..selection.context import Selection, Selector, SelectorTraits
from .sample import Sample
from .timing import Clock, Mark

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .step import VisionRows


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
    kv_bytes, past_bytes : tuple of int
        Bytes of keys and values, dense and as they are: of the cache after the prompt, and as the request found it.
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
    past_bytes: tuple[int, int] = (0, 0)
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

    def count_past(self, past_bytes: tuple[int, int]) -> None:
        """Note the bytes of the keys and values that it found in the cache, likewise."""
        self.past_bytes = past_bytes

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
        """Note the path that later steps run on, if it is another."""
        if path != self.path:
            self.remark(f"; later steps on the path {path}")

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
        self.failed = ": ".join(filter(None, (type(error).__name__, with_notes(error))))
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
