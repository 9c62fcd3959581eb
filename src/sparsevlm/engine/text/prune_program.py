"""The prune step as a program: for selectors that choose on the device, and counts that nobody waits for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import SparseVLMConfig
from ...kernels.close_up import Packed, close_up
from ...kernels.energy_rank import sketch_rank
from ...kernels.merge import write_merged
from ...kernels.take_states import take_states
from ...request.request import Request
from ...request.step import no_autocast
from ...selection.padded import (
    PaddedContext,
    PaddedSelection,
    rank_adaptive_counts,
    select_freely,
    select_padded,
)
from ..capacities import power_of_two, row_capacity
from ..cuda_graphs import GraphPool, LRUCache
from .readout import PaddedReadout, read_padded
from .stages import Choice, TokenCounts, most_by_rank
from .workspace import Workspace

_MOST_GRAPHS = 512
_NO_OPTIONS = SparseVLMConfig()


@dataclass(frozen=True)
class PruneShape:
    """Capacities of a prune step.

    Attributes
    ----------
    rows, batch : int
    n_visual, n_keep : int
        Visual tokens of the sample with the most, before and after.
    n_text : int
        Likewise, of the text that is read.
    n_images : int
        Images of one sample, if some sample has several with a floor each; else 0.
    """

    rows: int
    batch: int
    n_visual: int
    n_keep: int
    n_text: int = 0
    n_images: int = 0

    @classmethod
    def of(
        cls, rows: int, batch: int, n_visual: int, most_left: int, n_text: int, request: Request, by_rank: bool
    ) -> PruneShape:
        """Of a step with these capacities, in which a sample keeps ``most_left`` visual tokens at most.

        Where the rank decides, a step keeps what the one before and the capacity of the text let it keep, so that there
        are few chains of capacities.
        """
        most = max(len(sample.image_sizes) for sample in request.samples)
        n_images = power_of_two(most) if most > 1 and request.config.min_keep_per_image else 0
        if by_rank:
            most_left = max(most_left, most_by_rank(request, n_visual, n_text))
        n_keep = min(n_visual, visual_capacity(most_left, batch))
        return cls(rows, batch, n_visual, n_keep, n_text, n_images)


def visual_capacity(n_visual: int, batch: int) -> int:
    """Room for the visual tokens of every sample."""
    return row_capacity(n_visual) if batch == 1 else power_of_two(max(16, n_visual))


@dataclass(frozen=True)
class PruneStep:
    """What a program of a prune step is made for.

    Attributes
    ----------
    shape : PruneShape
    is_before : bool
        Whether it comes before the decoder, where there is no layer that is read.
    scaling : float
        Of the logits of its attention.
    needs : frozenset of str
        What the selector reads of it.
    by_rank, recycles : bool
        Whether the rank decides the counts, and whether clusters are among what it counts.
    first_late : int
        First layer behind it whose output gets visual features.
    config : SparseVLMConfig
        What belongs to one request alone has its default.
    is_free : bool
        Whether an adaptive selector decides the counts.
    """

    shape: PruneShape
    is_before: bool
    scaling: float
    needs: frozenset[str]
    by_rank: bool
    recycles: bool
    first_late: int
    config: SparseVLMConfig
    is_free: bool = False

    @classmethod
    def of(
        cls, request: Request, shape: PruneShape, target: int, scaling: float, counts: TokenCounts, n_late: int
    ) -> PruneStep:
        """Of a target layer of a request (-1: before the decoder) in a model whose first ``n_late`` layers get visual
        features."""
        first_late = min(target + 1, n_late)
        needs, traits, by_rank, is_free = request.traits.needs, request.traits, counts.by_rank, counts.is_free
        if not (needs or by_rank or is_free or traits.padded):  # one program for all options
            return cls(shape, False, 0.0, needs, False, False, first_late, _NO_OPTIONS)
        config = request.config.shared
        return cls(shape, target < 0, scaling, needs, by_rank, traits.recycles, first_late, config, is_free)


def run_prune_step(space: Workspace, selector: Any, step: PruneStep, target: int) -> Tensor:
    """Choose, and let go on what is chosen; waits for nothing. ``target`` is the layer that errors name.

    Returns
    -------
    Tensor, int64
        A packed :class:`~.stages.Choice`.
    """
    shape, packed = step.shape, _packed(space, step.shape)
    batch, n_visual = shape.batch, packed.n_visual
    states, valid = take_states(packed.hidden, packed.visual_rows, n_visual, space.is_faulty)
    with no_autocast(states.device):
        readout = read_padded(space, step, packed.visual_rows, valid)
        if step.is_before:
            space.is_faulty |= ~readout.is_finite(valid)
        context, ranks = _context(space, step, states, valid, n_visual, readout)
        floors = space.min_keep_per_image[:batch]
        given = (selector, context, packed.image_idx, floors, shape.n_images, target)
        if step.is_free:
            selection, n_keep = select_freely(*given)
            context = dataclasses.replace(context, n_keep=n_keep)
        else:
            selection = select_padded(*given)
    late = [(plane, plane[packed.visual_rows]) for plane in space.late[step.first_late :]]
    chosen = close_up(packed, selection.is_kept, context.n_keep, shape.n_keep)
    for plane, features in late:
        _follow(space, shape, plane, features, chosen)
    for rows, own in ((space.hidden, states), *late):
        if selection.merge_target is not None:
            _merge(space, shape, rows, own, selection, chosen)
    space.stage.add_(1)
    recycled = selection.is_recycled
    return Choice(
        alive=space.alive[:batch, : shape.n_keep],
        is_recycled=chosen * 0 if recycled is None else recycled.gather(1, chosen).long(),
        n_visual=context.n_keep,
        ranks=n_visual * 0 if ranks is None else ranks,
        is_rater=n_visual.new_zeros((batch, shape.n_text)) if readout.is_rater is None else readout.is_rater.long(),
    ).packed()


def _context(
    space: Workspace, step: PruneStep, states: Tensor, valid: Tensor, n_visual: Tensor, readout: PaddedReadout
) -> tuple[PaddedContext, Tensor | None]:
    """What the selector is given, and the ranks that decided."""
    batch, config = step.shape.batch, step.config
    seeds = space.seeds[:, :batch].index_select(0, space.stage)[0]
    ranks = n_clusters = None
    if not step.by_rank:
        n_keep = space.counts[:, :batch].index_select(0, space.stage)[0]
    else:
        assert readout.raters is not None
        ranks = sketch_rank(readout.raters, config.rank_tolerance)
        n_keep, n_clusters = rank_adaptive_counts(
            n_visual, ranks, step.shape.n_visual, config, step.recycles, space.is_faulty
        )
    coordinates = space.coordinates[:batch, :, : step.shape.n_visual] if step.is_before else None
    return PaddedContext(
        config=config,
        hidden_states=states,
        valid=valid,
        n_keep=n_keep,
        most_kept=step.shape.n_keep,
        seeds=seeds,
        rater_attention=readout.raters,
        last_attention=readout.last,
        prior_attention=readout.prior,
        previous_hidden_states=readout.previous,
        text_features=readout.text,
        is_text=readout.is_text,
        vision_attention=readout.vision_attention,
        vision_keys=readout.vision_keys,
        coordinates=coordinates,
        n_clusters=n_clusters if step.recycles else None,
    ), ranks


def _packed(space: Workspace, shape: PruneShape) -> Packed:
    """What a step closes up."""
    rows, batch = shape.rows, shape.batch
    visual_rows, alive, image_idx = (
        own[:batch, : shape.n_visual] for own in (space.visual_rows, space.alive, space.image_idx)
    )
    hidden, cos, sin = (own[:rows] for own in (space.hidden, space.cos, space.sin))
    return Packed(
        hidden,
        cos,
        sin,
        space.cu_seqlens[: batch + 1],
        space.n_visual[:batch],
        visual_rows,
        alive,
        image_idx,
        space.n_text[:batch],
        space.text_rows[:batch, : shape.n_text],
    )


def _follow(space: Workspace, shape: PruneShape, plane: Tensor, features: Tensor, chosen: Tensor) -> None:
    """Let features that are still to be added, (batch, n_visual, hidden_size), follow the tokens that are kept."""
    batch, last = shape.batch, shape.rows - 1
    counts = torch.arange(shape.n_keep, device=chosen.device) < space.n_visual[:batch, None]
    rows = torch.where(counts, space.visual_rows[:batch, : shape.n_keep], last).flatten()
    plane[: shape.rows] = 0.0
    kept = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1]))
    plane.index_copy_(0, rows, kept.flatten(0, 1))
    plane[last] = 0.0  # padding, where what does not count was written


def _merge(
    space: Workspace, shape: PruneShape, hidden: Tensor, states: Tensor, selection: PaddedSelection, chosen: Tensor
) -> None:
    """Write the rows that others were merged into, after all closed up."""
    target, weight, batch = selection.merge_target, selection.weight, shape.batch
    assert target is not None
    assert weight is not None
    rows = space.visual_rows[:batch, : shape.n_keep]
    write_merged(hidden[: shape.rows], rows, space.n_visual[:batch], states, chosen, target, weight)


class PrunePrograms(LRUCache[tuple[Hashable, PruneStep], Callable[[], Tensor]]):
    """Programs of prune steps over one workspace.

    Parameters
    ----------
    pool : GraphPool
    space : Workspace
    """

    def __init__(self, pool: GraphPool, space: Workspace) -> None:
        super().__init__(_MOST_GRAPHS)
        self._pool, self._space = pool, space
        self._target = 0

    def run(self, selector: Any, step: PruneStep, target: int) -> Tensor:
        """See :func:`run_prune_step`; the next run overwrites what it gives."""
        self._target = target  # of this run: a program serves several layers

        def run() -> Tensor:
            return run_prune_step(self._space, selector, step, self._target)

        key = (_identity(selector), step)
        return self.get(key, lambda: self._pool.record(run, self._space.snapshot(step.shape.rows)))()


def _identity(selector: Any) -> Hashable:
    """Objects without attributes of their own are as good as any other of their class, and so are equal ones of frozen
    classes."""
    params = getattr(type(selector), "__dataclass_params__", None)
    if not vars(selector) or (params is not None and params.frozen and params.eq):
        return (type(selector), *vars(selector).items())
    return (selector,) if isinstance(selector, Hashable) else (id(selector),)
