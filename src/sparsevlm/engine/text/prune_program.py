"""The prune step as a program: for selectors that choose on the device, and counts that the host knows."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...request.request import Request, StageRecord
from ...selection.budget import nothing_to_drop
from ...selection.context import OrderedSelector
from ...selection.image_floor import choose_by_order
from ..capacities import power_of_two, row_capacity
from ..cuda_graphs import GraphPool, LRUCache, to_device
from .workspace import MOST_STAGES, PromptShape, Workspace

_MOST_GRAPHS = 256
# Visual tokens of a sample whose order a program looks for, at most: what selectors hold for all pairs grows with the
# square.
_MOST_VISUAL = 1 << 14


@dataclass(frozen=True)
class TokenCounts:
    """Visual tokens by stage (before the first target that drops something, and after each) and sample.

    Attributes
    ----------
    targets : tuple of int
        Those that drop something.
    visual : list of list of int
    """

    targets: tuple[int, ...]
    visual: list[list[int]]

    @classmethod
    def of(cls, request: Request) -> TokenCounts:
        """Of a request with fixed budgets."""
        targets, visual = [], [[sample.alive.shape[0] for sample in request.samples]]
        for stage, target in enumerate(request.target_layers):
            left = []
            for sample, n in zip(request.samples, visual[-1], strict=True):
                assert sample.plan is not None  # of a fixed budget
                n_keep = sample.plan.counts[stage]
                left.append(n_keep if nothing_to_drop(n, n_keep, request.config.min_keep) is None else n)
            if left != visual[-1]:
                targets.append(target)
                visual.append(left)
        return cls(tuple(targets), visual)


def chooses_on_device(request: Request) -> bool:
    """Tells whether neither counts nor choices of a request wait for the device."""
    most = max(sample.alive.shape[0] for sample in request.samples)
    is_fixed = all(sample.plan is not None for sample in request.samples)
    return request.traits.ordered and is_fixed and most <= _MOST_VISUAL and len(request.target_layers) <= MOST_STAGES


@dataclass(frozen=True)
class PruneShape:
    """Capacities of a prune step.

    Attributes
    ----------
    rows, batch : int
    n_visual, n_keep : int
        Visual tokens of the sample with the most, before and after.
    n_images : int
        Images of one sample, if some sample has several with a floor each; else 0.
    """

    rows: int
    batch: int
    n_visual: int
    n_keep: int
    n_images: int = 0

    @classmethod
    def of(cls, rows: int, prompt: PromptShape, n_visual: int, most_left: int, request: Request) -> PruneShape:
        """Of a step into which visual tokens come with the capacity ``n_visual``, ``most_left`` of which a sample
        keeps."""
        most = max(len(sample.image_sizes) for sample in request.samples)
        n_images = power_of_two(most) if most > 1 and request.config.min_keep_per_image else 0
        n_keep = min(n_visual, visual_capacity(most_left, prompt.batch))
        return cls(rows, prompt.batch, n_visual, n_keep, n_images)


def visual_capacity(n_visual: int, batch: int) -> int:
    """Room for the visual tokens of every sample."""
    return row_capacity(n_visual) if batch == 1 else power_of_two(max(16, n_visual))


def run_prune_step(space: Workspace, selector: OrderedSelector, shape: PruneShape) -> Tensor:
    """Choose, and let go on what is chosen; waits for nothing.

    Returns
    -------
    Tensor of shape (batch, n_keep), int64
        Which visual tokens are left, ascending, as indices into those of the prompt; the first ``space.n_visual`` of
        a row count.
    """
    rows, batch = shape.rows, shape.batch
    hidden, cu_seqlens = space.hidden[:rows], space.cu_seqlens[: batch + 1]
    visual_rows = space.visual_rows[:batch, : shape.n_visual]
    n_visual, left = space.n_visual[:, :batch].index_select(0, torch.cat([space.stage, space.stage + 1])).unbind()
    valid = torch.arange(shape.n_visual, device=hidden.device) < n_visual[:, None]
    picks = selector.order(hidden[visual_rows], valid, shape.n_keep)
    if shape.n_images:
        image_idx, min_keep = space.image_idx[:batch, : shape.n_visual], space.min_keep_per_image[:batch]
        is_chosen = choose_by_order(picks, image_idx, valid, left, min_keep, shape.n_images)
        chosen = torch.argsort(~is_chosen, dim=1, stable=True)[:, : shape.n_keep]
        space.image_idx[:batch, : shape.n_keep] = image_idx.gather(1, chosen)
    else:
        chosen = ascending(picks, left, shape.n_visual)
    going_on, rows_of_chosen = compact(visual_rows, valid, chosen, left, rows)
    alive = space.alive[:batch, : shape.n_visual].gather(1, chosen)
    space.gather(going_on)
    space.visual_rows[:batch, : shape.n_keep] = rows_of_chosen
    space.alive[:batch, : shape.n_keep] = alive
    lengths = cu_seqlens.diff() - n_visual + left
    cu_seqlens[1:] = lengths.cumsum(0)
    space.stage.add_(1)
    return alive


def ascending(picks: Tensor, left: Tensor, n: int) -> Tensor:
    """The first ``left[b]`` picks of every sample in the order of the tokens, the others behind."""
    late = torch.arange(picks.shape[1], device=picks.device) >= left[:, None]
    ordered = (picks + late * n).sort(dim=1).values
    return ordered % n


def compact(visual_rows: Tensor, valid: Tensor, chosen: Tensor, left: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Finds the rows that go on, those that do not behind them, and where the chosen tokens are among them.

    Parameters
    ----------
    visual_rows, valid : Tensor of shape (batch, n_visual)
        Rows of visual tokens, and which of these are tokens.
    chosen : Tensor of shape (batch, n_keep), int64
        Indices into ``visual_rows``; the first ``left[b]`` of a sample count.
    left : Tensor of shape (batch,), int64
    n_rows : int

    Returns
    -------
    rows : Tensor of shape (n_rows,), int64
    rows_of_chosen : Tensor of shape (batch, n_keep), int64
    """
    goes_on = torch.ones(n_rows + 1, dtype=torch.bool, device=visual_rows.device)
    # What counts as no token is written to one place behind the end.
    goes_on.index_fill_(0, torch.where(valid, visual_rows, n_rows).flatten(), False)
    counts = torch.arange(chosen.shape[1], device=chosen.device) < left[:, None]
    chosen_rows = visual_rows.gather(1, chosen)
    goes_on.index_fill_(0, torch.where(counts, chosen_rows, n_rows).flatten(), True)
    flags = goes_on[:n_rows]
    rows = torch.argsort(~flags, stable=True)
    place = flags.cumsum(dim=0) - 1
    return rows, torch.where(counts, place[chosen_rows.clamp_max(n_rows - 1)], n_rows - 1)


def record(request: Request, counts: TokenCounts, kept: list[Tensor], n_layers: int) -> None:
    """Bring a request's samples up to date, as a prune step does, without waiting for the device."""
    by_layer = [sum(target < layer_idx for target in counts.targets) for layer_idx in range(n_layers)]
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
                stage = counts.targets.index(target)
                left = kept[stage][b, : counts.visual[stage + 1][b]]
                sample.keep_only(left if first is None else first[left])
            sample.add_stage(StageRecord(target, n_in, None, skipped, kept=sample.alive if n_in else None))


class PrunePrograms(LRUCache[tuple[Hashable, PruneShape], Callable[[], Tensor]]):
    """Programs of prune steps over one workspace.

    Parameters
    ----------
    pool : GraphPool
    space : Workspace
    """

    def __init__(self, pool: GraphPool, space: Workspace) -> None:
        super().__init__(_MOST_GRAPHS)
        self._pool, self._space = pool, space

    def run(self, selector: OrderedSelector, shape: PruneShape) -> Tensor:
        """See :func:`run_prune_step`; the next run overwrites what it gives."""
        # Objects without attributes of their own are as good as any other of their class.
        key: Any = (selector if vars(selector) else type(selector), shape)

        def run() -> Tensor:
            return run_prune_step(self._space, selector, shape)

        return self.get(key, lambda: self._pool.record(run, self._space.snapshot(shape.rows)))()
