"""Selection over samples filled up to one size: what :mod:`.decide` decides, without waiting for any value of the
device."""

from __future__ import annotations

import dataclasses
import inspect
import random
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config import SparseVLMConfig
from ..kernels.places import first_picks
from ..kernels.rank_counts import RankRule, rank_counts
from .context import Selection, SelectionContext, Selector
from .image_floor import choose_by_order, count_per_image
from .selector_calls import call_selector, recorded_alike
from .similarity import finite


@dataclass(frozen=True)
class PaddedContext:
    """Samples at one target layer, filled up to one size. Only what the selector ``needs`` is filled in.

    Attributes
    ----------
    config : SparseVLMConfig
        What belongs to one request alone has its default: budgets, ``seed``, ``selector``.
    hidden_states : Tensor of shape (batch, n_visual, hidden_size)
        Visual rows of the output of the target layer, whichever that is; before the decoder of its input embeddings,
        which are the ``features`` of :class:`~.context.SelectionContext`.
    valid : Tensor of shape (batch, n_visual), bool
        False for rows that only fill a sample up; these come last.
    n_keep : Tensor of shape (batch,), int64
        Rows that go on: at most ``most_kept``, and at most the valid ones.
    most_kept : int
    seeds : Tensor of shape (batch,), int64
        For selectors that draw: another number for every sample, target layer and ``config.seed``; below 2**31.
    rater_attention : Tensor of shape (batch, n_raters, n_visual), float32, optional
        0 for text that does not vote.
    last_attention, prior_attention : Tensor of shape (batch, n_visual), float32, optional
    previous_hidden_states : Tensor of shape (batch, n_visual, hidden_size), optional
    text_features : Tensor of shape (batch, n_text, hidden_size), optional
    is_text : Tensor of shape (batch, n_text), bool, optional
        False for rows that only fill ``text_features`` up; these come last.
    vision_attention : Tensor of shape (batch, 2, n_visual), float32, optional
    vision_keys : Tensor of shape (batch, n_visual, head_dim), float32, optional
    coordinates : Tensor of shape (batch, 3, n_visual), int64, optional
        Given before the decoder, to every selector.
    n_clusters : Tensor of shape (batch,), int64, optional
        As in :class:`~.context.SelectionContext`, where the rank decides.
    """

    config: SparseVLMConfig
    hidden_states: Tensor
    valid: Tensor
    n_keep: Tensor
    most_kept: int
    seeds: Tensor
    rater_attention: Tensor | None = None
    last_attention: Tensor | None = None
    prior_attention: Tensor | None = None
    previous_hidden_states: Tensor | None = None
    text_features: Tensor | None = None
    is_text: Tensor | None = None
    vision_attention: Tensor | None = None
    vision_keys: Tensor | None = None
    coordinates: Tensor | None = None
    n_clusters: Tensor | None = None

    @cached_property
    def n_visual(self) -> Tensor:
        """Visual tokens of every sample, (batch,)."""
        return self.valid.sum(dim=1)

    @property
    def n_picks(self) -> Tensor:
        """Picks of every sample that decide anything, (batch,): none where all tokens are kept."""
        return self.n_keep * (self.n_keep < self.n_visual)


@dataclass(frozen=True)
class PaddedSelection:
    """The outcome for samples filled up to one size; merges as in :class:`~.context.Selection`.

    Attributes
    ----------
    is_kept : Tensor of shape (batch, n_visual), bool
        True for ``n_keep`` valid rows of every sample.
    merge_target : Tensor of shape (batch, n_visual), int64, optional
    weight : Tensor of shape (batch, n_visual), float32, optional
    is_recycled : Tensor of shape (batch, n_visual), bool, optional
    """

    is_kept: Tensor
    merge_target: Tensor | None = None
    weight: Tensor | None = None
    is_recycled: Tensor | None = None


@runtime_checkable
class PaddedSelector(Selector, Protocol):
    """A selector that chooses for a batch without waiting for any value of the device: the engine captures it."""

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """Choose exactly ``context.n_keep`` of the valid rows of every sample."""
        ...


def padded_sample(context: SelectionContext, n_keep: int) -> PaddedContext:
    """One sample as a batch, with nothing to fill up.

    Raises
    ------
    ValueError
        If what it is judged by holds NaN or infinity.
    """

    def batched(values: Tensor | None) -> Tensor | None:
        return None if values is None else finite(values)[None]

    states, text = context.hidden_states, context.text_features
    padded = PaddedContext(
        config=context.config,
        hidden_states=states.detach()[None],
        valid=torch.ones((1, context.n_visual), dtype=torch.bool, device=states.device),
        n_keep=torch.tensor([n_keep], device=states.device),
        most_kept=n_keep,
        seeds=torch.tensor([draw_seed(context.config.seed, context.layer, context.sample)], device=states.device),
        rater_attention=batched(context.rater_attention),
        last_attention=batched(context.last_attention),
        prior_attention=batched(context.prior_attention),
        previous_hidden_states=batched(context.previous_hidden_states),
        text_features=batched(text),
        is_text=None if text is None else torch.ones((1, text.shape[0]), dtype=torch.bool, device=states.device),
        vision_attention=batched(context.vision_attention),
        vision_keys=batched(context.vision_keys),
        coordinates=context.coordinates[None] if context.layer < 0 else None,
        n_clusters=None if context.n_clusters is None else torch.tensor([context.n_clusters], device=states.device),
    )
    return recorded_alike(context, padded)


def unpadded(selection: PaddedSelection) -> Selection:
    """The selection of a batch of one sample with nothing to fill up."""
    recycled = None if selection.is_recycled is None else selection.is_recycled[0].nonzero().squeeze(-1)
    target, weight = (None if one is None else one[0] for one in (selection.merge_target, selection.weight))
    return Selection(selection.is_kept[0].nonzero().squeeze(-1), target, weight, recycled)


def draw_seed(seed: int, layer: int, sample: int) -> int:
    """Number below 2**31 of a sample at a target layer, for selectors that draw."""
    return random.Random(f"{seed} {layer} {sample}").getrandbits(31)


def rank_adaptive_counts(
    n_visual: Tensor, ranks: Tensor, most: int, config: SparseVLMConfig, recycles: bool, is_faulty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`~.budget.rank_adaptive_count` of several samples, on their device.

    Parameters
    ----------
    n_visual, ranks : Tensor of shape (batch,), int64
        A rank below 0 is none.
    most : int
        No sample has more visual tokens.
    config : SparseVLMConfig
    recycles : bool
        Whether the selector recycles, if ``config.recycle`` lets it.
    is_faulty : Tensor of shape (1,), bool, optional
        Becomes True where a rank is none.

    Returns
    -------
    n_keep, n_clusters : Tensor of shape (batch,), int64
        All, and none, of samples that have no more than ``min_keep``, or where nothing would be dropped.
    """
    rule = RankRule(config.rank_lambda, config.tau, config.theta, recycles and config.recycle, config.min_keep)
    return rank_counts(n_visual, ranks, most, rule, is_faulty)


def select_padded(
    selector: Any,
    context: PaddedContext,
    image_idx: Tensor | None,
    min_keep: Tensor | None,
    n_images: int,
    layer: int,
) -> PaddedSelection:
    """Selection of a selector that waits for nothing; samples that lose no token are left as they are.

    Parameters
    ----------
    selector : PaddedSelector or OrderedSelector
    context : PaddedContext
    image_idx : Tensor of shape (batch, n_visual), int64, optional
    min_keep : Tensor of shape (batch,), int64, optional
        Floor of every image of a sample.
    n_images : int
        0: no sample has floors.
    layer : int
        Target layer, which errors name; -1: before the decoder.
    """
    valid, n_keep = context.valid, context.n_keep
    if not is_padded(selector):
        looked_at = {"counts": context.n_picks} if not n_images and _takes_counts(type(selector)) else {}
        most = context.most_kept
        picks = call_selector(
            selector, layer, lambda _: selector.order(context.hidden_states, valid, most, **looked_at), ()
        )
        return _along(picks, context, image_idx, min_keep, n_images)
    keeps_all = (n_keep >= context.n_visual)[:, None]
    found: PaddedSelection = call_selector(selector, layer, lambda given: selector.select_padded(given[0]), (context,))
    is_kept = torch.where(keeps_all, valid, found.is_kept)
    if found.merge_target is None:
        return PaddedSelection(is_kept)
    recycled = None if found.is_recycled is None else found.is_recycled & ~keeps_all
    return PaddedSelection(is_kept, found.merge_target.masked_fill(keeps_all, -1), found.weight, recycled)


def select_freely(
    selector: Any,
    context: PaddedContext,
    image_idx: Tensor | None,
    min_keep: Tensor | None,
    n_images: int,
    layer: int,
) -> tuple[PaddedSelection, Tensor]:
    """Selection of an adaptive selector that waits for nothing, and how many tokens of each sample it takes.

    Parameters
    ----------
    selector : AdaptiveSelector
    context : PaddedContext
        Its ``n_keep`` and ``most_kept`` say nothing.
    image_idx, min_keep, n_images, layer :
        As of :func:`select_padded`.

    Returns
    -------
    selection : PaddedSelection
    n_keep : Tensor of shape (batch,), int64
    """
    valid, config = context.valid, context.config
    least, most_least = context.n_visual.clamp_max(config.min_keep), config.min_keep
    if n_images:
        assert image_idx is not None
        assert min_keep is not None
        floors = torch.minimum(count_per_image(image_idx, valid, n_images), min_keep[:, None]).sum(dim=1)
        least, most_least = torch.maximum(least, floors), max(most_least, n_images * config.min_keep_per_image)
    states = context.hidden_states
    order, n_keep = call_selector(
        selector, layer, lambda _: selector.adaptive_order(states, valid, least, most_least), ()
    )
    return _along(order, dataclasses.replace(context, n_keep=n_keep), image_idx, min_keep, n_images), n_keep


def _along(
    picks: Tensor, context: PaddedContext, image_idx: Tensor | None, min_keep: Tensor | None, n_images: int
) -> PaddedSelection:
    """Selection along an order of picks, with the floors of the images."""
    valid, n_keep = context.valid, context.n_keep
    if not n_images:
        return PaddedSelection(first_picks(picks, n_keep, valid))
    assert image_idx is not None
    assert min_keep is not None
    is_kept = choose_by_order(picks, image_idx, valid, n_keep, min_keep, n_images)
    return PaddedSelection(torch.where((n_keep >= context.n_visual)[:, None], valid, is_kept))


def _takes_counts(kind: Any) -> bool:
    return "counts" in inspect.signature(kind.order).parameters


def is_padded(selector: Any) -> bool:
    """Tells whether a selector takes padded samples."""
    return callable(getattr(selector, "select_padded", None))
