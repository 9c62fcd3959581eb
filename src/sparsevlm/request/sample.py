"""One sample of a request: its visual tokens, which are left, and the record of each choice."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models import Grid, Layout, View, as_grid, views
from ..report_sample import StageReport
from ..selection.budget import Plan


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
        all_stay = "budget and floors keep every visual token here" if len(kept) == self.n_in > 0 else None
        return StageReport(
            layer=self.layer,
            n_in=self.n_in,
            n_kept=self.n_in if gone_on is None else len(kept),
            n_recycled=len(recycled),
            rank=self.rank,
            raters=() if self.raters is None else tuple(self.raters.tolist()),
            kept=kept,
            recycled=tuple(sorted(recycled)),
            skipped_because=self.skipped_because or all_stay,
            per_image=_per_image(gone_on, image_sizes),
        )


def _per_image(gone_on: Sequence[int] | None, image_sizes: Sequence[int]) -> tuple[int, ...]:
    """How many of the tokens that have gone on, ascending (``None``: all), are of each image."""
    if gone_on is None:
        return tuple(image_sizes)
    ends = (bisect.bisect_left(gone_on, end) for end in itertools.accumulate(image_sizes, initial=0))
    return tuple(after - before for before, after in itertools.pairwise(ends))
