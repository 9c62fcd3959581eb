"""One decision: from attention to the tokens that go on, for samples at one target layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .budget import clamped_floors, nothing_by_rank, nothing_to_drop, rank_adaptive_count
from .context import OrderedSelector, Selection, SelectionContext, Selector, SelectorTraits
from .image_floor import choose_by_order, count_per_image, floors_within, keep_of_every_image
from .rank import sketch_ranks
from .selector_calls import call_selector
from .similarity import NOT_FINITE

# Elements of the states that a selector is given at once: 32 Mi float32 = 128 MiB.
_MAX_BATCH_ELEMENTS = 1 << 25
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Decision:
    """Outcome for one sample: the selection (``None``: nothing is dropped), the rank that decided, the reason for
    doing nothing, and where a rank decided why the floors of its images could not hold."""

    selection: Selection | None
    rank: int | None = None
    skipped_because: str | None = None
    clamped: str | None = None


@dataclass(frozen=True)
class _Task:
    """Question to the selector for one sample, and its answer where it had the choice of how many."""

    context: SelectionContext
    n_keep: int
    rank: int | None = None
    answer: Selection | None = None

    @property
    def has_floors(self) -> bool:
        """Whether its images have floors."""
        return self.context.n_images > 1 and self.context.config.min_keep_per_image > 0

    @property
    def image_idx(self) -> Tensor:
        """Image of each row, (1, n_visual)."""
        assert self.context.image_idx is not None  # given with the number of images
        return self.context.image_idx.to(self.context.hidden_states.device)[None]


def decide(
    contexts: Sequence[SelectionContext], selector: Selector, traits: SelectorTraits, n_keeps: Sequence[int | None]
) -> list[Decision]:
    """Run the budget policy and the selector, and hold the floor of every image where a sample has several.

    Samples of which equally many tokens are left, and are to go on, come to a selector with ``select_batch`` together.

    Parameters
    ----------
    contexts : sequence of SelectionContext
        With ``rater_attention`` where the selector needs it or the sample's ``n_keep`` is ``None``.
    selector : Selector
    traits : SelectorTraits
    n_keeps : sequence of int or None
        Tokens of each sample that leave the layer, or ``None``: the rank decides, or an adaptive selector.

    Returns
    -------
    list of Decision
        One per sample.

    Raises
    ------
    ValueError, TypeError
        If the selector's answer is ill-formed, it reads what its ``needs`` do not list, or the attention or the states
        hold NaN.
    Exception
        Any that the selector raises, with a note of its name and the layer.
    """
    given = list(zip(contexts, n_keeps, strict=True))
    ranks = {} if traits.adaptive else _ranks(given)
    answers = _free_answers(selector, traits, given) if traits.adaptive else {}
    policy = [
        _apply_budget(context, traits, n_keep, ranks.get(i), answers.get(i))
        for i, (context, n_keep) in enumerate(given)
    ]
    decisions = {i: one for i, one in enumerate(policy) if isinstance(one, Decision)}
    tasks = {i: one for i, one in enumerate(policy) if isinstance(one, _Task)}
    for group in _alike(tasks, traits):
        for i, selection in zip(group, _select(selector, traits, [tasks[i] for i in group]), strict=True):
            decisions[i] = Decision(selection, tasks[i].rank, clamped=_clamped(tasks[i]))
    return [decisions[i] for i in range(len(contexts))]


def _free_answers(
    selector: Any, traits: SelectorTraits, given: list[tuple[SelectionContext, int | None]]
) -> dict[int, Selection]:
    """What an adaptive selector takes of samples without a budget, by their places."""
    places = [
        i
        for i, (context, n_keep) in enumerate(given)
        if n_keep is None and nothing_to_drop(context.n_visual, None, context.config.min_keep) is None
    ]
    answers: list[Selection] = []
    while len(answers) < len(places):
        left = [given[i][0] for i in places[len(answers) :]]
        at_once = _n_at_once(left) if traits.batched else 1
        # A selector may write into what it is given, and may be asked again.
        answers += _ask(selector, traits, [_copied(context) for context in left[:at_once]], None)
    return dict(zip(places, answers, strict=True))


def _n_at_once(contexts: Sequence[SelectionContext]) -> int:
    """How many of the first samples, all filled up to the size of the largest, a selector may be given at once."""
    most = 0
    for i, context in enumerate(contexts):
        most = max(most, context.hidden_states.numel())
        if i and (i + 1) * most > _MAX_BATCH_ELEMENTS:
            return i
    return len(contexts)


def _least(context: SelectionContext) -> int:
    """How many tokens go on at least: ``min_keep``, or what the floors of the images take."""
    least = context.config.min_keep
    if context.n_images > 1:
        assert context.image_idx is not None  # given with the number of images
        floors = torch.bincount(context.image_idx).clamp(max=context.config.min_keep_per_image)
        least = max(least, int(floors.sum()))
    return min(context.n_visual, least)


def _ranks(given: list[tuple[SelectionContext, int | None]]) -> dict[int, int]:
    """Ranks of the rater attention, by the places of the samples whose counts they decide."""
    places, matrices = [], []
    for i, (context, n_keep) in enumerate(given):
        if n_keep is None and nothing_to_drop(context.hidden_states.shape[0], None, context.config.min_keep) is None:
            assert context.rater_attention is not None
            places.append(i)
            matrices.append(context.rater_attention)
    if not places:
        return {}
    return dict(zip(places, sketch_ranks(matrices, given[places[0]][0].config.rank_tolerance), strict=True))


def _apply_budget(
    context: SelectionContext, traits: SelectorTraits, n_keep: int | None, rank: int | None, answer: Selection | None
) -> _Task | Decision:
    config, n_visual = context.config, context.hidden_states.shape[0]
    if (why := nothing_to_drop(n_visual, n_keep, config.min_keep)) is not None:
        return Decision(None, None, why)
    if n_keep is not None:
        return _Task(context, n_keep)
    if answer is not None:
        n_taken, least = answer.keep_idx.shape[0], _least(context)
        return _Task(context, n_taken, answer=answer) if n_taken >= least else _Task(context, least)
    assert rank is not None
    n_keep, n_clusters = rank_adaptive_count(
        n_visual, rank, config.rank_lambda, config.tau, config.theta,
        config.recycle and traits.recycles, config.min_keep,
    )  # fmt: skip
    if (why := nothing_by_rank(n_visual, n_keep, n_clusters, rank, config.tau, config.theta)) is not None:
        return Decision(None, rank, why)
    if traits.recycles:
        context = dataclasses.replace(context, n_clusters=n_clusters)
    return _Task(context, n_keep, rank)


def _alike(tasks: dict[int, _Task], traits: SelectorTraits) -> list[list[int]]:
    """Places of samples that a selector can answer at once."""
    groups: dict[tuple[int, int, bool, bool], list[list[int]]] = {}
    for i, task in tasks.items():
        states = task.context.hidden_states
        by_order = traits.ordered and task.has_floors
        of_this_size = groups.setdefault((states.shape[0], task.n_keep, by_order, task.answer is None), [[]])
        n_elements = (len(of_this_size[-1]) + 1) * states.numel()
        if of_this_size[-1] and (n_elements > _MAX_BATCH_ELEMENTS or not (traits.batched or by_order)):
            of_this_size.append([])
        of_this_size[-1].append(i)
    return [group for of_this_size in groups.values() for group in of_this_size]


def _select(selector: Any, traits: SelectorTraits, tasks: list[_Task]) -> list[Selection]:
    """Selections of tasks that are alike, with a floor for every image."""
    if traits.ordered and tasks[0].has_floors:
        return _by_order(selector, traits, tasks)
    selections = [task.answer for task in tasks if task.answer is not None]  # of all, or of none
    if not selections:
        given = [_copied(task.context) if task.has_floors else task.context for task in tasks]
        selections = _ask(selector, traits, given, tasks[0].n_keep)
    for i, task in enumerate(tasks):
        if task.has_floors:
            selections[i] = _with_floors(selector, traits, task, selections[i])
    return selections


def _copied(context: SelectionContext) -> SelectionContext:
    return context.at(torch.arange(context.n_visual, device=context.hidden_states.device))


def _ask(
    selector: Any, traits: SelectorTraits, contexts: list[SelectionContext], n_keep: int | None
) -> list[Selection]:
    """Checked answers of a selector, of any length where ``n_keep`` is ``None``."""

    def call(given: Sequence[SelectionContext]) -> Any:
        if not traits.batched:
            return [selector.select(context, n_keep) for context in given]
        results = selector.select_batch(given, n_keep)
        return list(results) if isinstance(results, Iterable) else results

    results = call_selector(selector, contexts[0].layer, call, contexts)
    if not isinstance(results, list):
        raise TypeError(f"selector {traits.name!r}: select_batch must return one result per sample, got {results!r}.")
    if len(results) != len(contexts):
        raise ValueError(
            f"selector {traits.name!r}: select_batch returned {len(results)} results for {len(contexts)} samples."
        )
    return [
        checked_selection(result, context.hidden_states, n_keep, traits.name)
        for result, context in zip(results, contexts, strict=True)
    ]


def _with_floors(selector: Any, traits: SelectorTraits, task: _Task, first: Selection) -> Selection:
    """The selection of a sample with several images by a selector without an order, from its first answer on."""
    context, images = task.context, task.image_idx
    left = count_per_image(images, torch.ones_like(images), context.n_images)
    floors = floors_within(left, left.new_tensor([task.n_keep]), left.new_tensor([context.config.min_keep_per_image]))

    def ask(rows: Tensor, k: int) -> Selection:
        own = context.at(rows)
        if context.n_clusters is not None:
            own = dataclasses.replace(own, n_clusters=context.n_clusters * k // task.n_keep)
        return _ask(selector, traits, [own], k)[0]

    return keep_of_every_image(first, ask, images[0], floors[0].tolist())


def _clamped(task: _Task) -> str | None:
    """Why floors cannot hold in a number that the rank has decided; that of a budget is known beforehand."""
    if task.rank is None or not task.has_floors:
        return None
    context, min_keep = task.context, task.context.config.min_keep_per_image
    left = torch.bincount(task.image_idx[0]).tolist()
    return clamped_floors(left, task.n_keep, min_keep, context.layer)


def _by_order(selector: OrderedSelector, traits: SelectorTraits, tasks: list[_Task]) -> list[Selection]:
    """Selections of alike samples with several images each, along the selector's order."""
    n_keep, n_images = tasks[0].n_keep, max(task.context.n_images for task in tasks)
    images = torch.cat([task.image_idx for task in tasks])
    states, valid = (
        torch.stack([task.context.hidden_states for task in tasks]),
        torch.ones_like(images, dtype=torch.bool),
    )
    layer = tasks[0].context.layer
    picks = call_selector(selector, layer, lambda _: selector.order(states.detach(), valid, n_keep), ())
    if not _is_whole(picks) or picks.shape != (len(tasks), n_keep):
        got = tuple(picks.shape) if isinstance(picks, Tensor) else picks
        raise ValueError(
            f"selector {traits.name!r}: order must return indices of shape {(len(tasks), n_keep)}, got {got}."
        )
    for task, own in zip(tasks, picks, strict=True):
        checked_selection(own.sort().values, task.context.hidden_states, n_keep, traits.name)
    floors = images.new_tensor([task.context.config.min_keep_per_image for task in tasks])
    chosen = choose_by_order(picks.long(), images, valid, floors.new_tensor([n_keep] * len(tasks)), floors, n_images)
    return [Selection(own.nonzero().squeeze(-1)) for own in chosen]


def checked_selection(result: Any, hidden_states: Tensor, n_keep: int | None, name: str) -> Selection:
    """Check what a selector returned and complete the shorthand.

    Costs one synchronisation with the device, and one more each for merges and for recycled rows where there are any.

    Parameters
    ----------
    result : Any
        A :class:`Selection`, or an index tensor.
    hidden_states : Tensor of shape (n_visual, hidden_size)
        What was selected from.
    n_keep : int or None
        Rows that were asked for; ``None``: any number.
    name : str
        The selector's.

    Raises
    ------
    TypeError
        If the result or a part of it is no tensor of the right kind.
    ValueError
        If indices are duplicated, unsorted, out of range or of the wrong number, or merges are ill-formed; if the
        states hold NaN, which not every selector looks at.
    """
    selection = result if isinstance(result, Selection) else Selection(keep_idx=result)
    n_visual, device = hidden_states.shape[0], hidden_states.device
    if not _is_whole(selection.keep_idx):
        kept = selection.keep_idx
        if isinstance(kept, Tensor):
            answer, remedy = f"{kept.dtype} of shape {tuple(kept.shape)}", "not a mask and not scores"
        else:
            answer = "None" if kept is None else f"a {type(kept).__name__}"
            remedy = "as a torch.Tensor"
        raise TypeError(
            f"selector {name!r} must return a Selection or a tensor of whole indices, got {answer}: return int64 row "
            f"indices in ascending order, {remedy}."
        )
    keep_idx = selection.keep_idx.to(device=device, dtype=torch.long)
    if keep_idx.ndim != 1 or n_keep not in (None, keep_idx.shape[0]):
        got, wanted = tuple(keep_idx.shape), "n" if n_keep is None else n_keep
        raise ValueError(f"selector {name!r} returned indices of shape {got}, expected ({wanted},).")
    is_finite, in_range, ascending = _on_host(
        torch.isfinite(hidden_states).all(),
        ((keep_idx >= 0) & (keep_idx < n_visual)).all(),
        (keep_idx[1:] > keep_idx[:-1]).all(),
    )
    if not is_finite:
        raise ValueError(NOT_FINITE)
    if not in_range:
        raise ValueError(f"selector {name!r} returned indices outside 0..{n_visual - 1}.")
    if not ascending:
        what = "duplicate" if torch.unique(keep_idx).shape[0] < keep_idx.shape[0] else "unsorted"
        raise ValueError(f"selector {name!r} returned {what} indices; they must be sorted and distinct.")
    is_kept = torch.zeros(n_visual, dtype=torch.bool, device=device).index_fill_(0, keep_idx, True)
    return Selection(keep_idx, *_checked_merge(selection, is_kept, name), _checked_recycled(selection, is_kept, name))


def _checked_merge(selection: Selection, is_kept: Tensor, name: str) -> tuple[Tensor | None, Tensor | None]:
    target, weight, n_visual = selection.merge_target, selection.weight, is_kept.shape[0]
    if (target is None) != (weight is None):
        raise ValueError(f"selector {name!r}: merge_target and weight go together.")
    if target is None or weight is None:
        return None, None
    if not _is_whole(target):
        raise TypeError(f"selector {name!r}: merge_target must be a tensor of whole indices, got {target!r}.")
    if not isinstance(weight, Tensor) or weight.dtype == torch.bool or weight.is_complex():
        raise TypeError(f"selector {name!r}: weight must be a tensor of numbers, got {weight!r}.")
    if target.shape != (n_visual,) or weight.shape != (n_visual,):
        raise ValueError(
            f"selector {name!r}: merge_target and weight must have shape ({n_visual},), "
            f"got {tuple(target.shape)} and {tuple(weight.shape)}."
        )
    target = target.to(device=is_kept.device, dtype=torch.long)
    weight = weight.detach().to(device=is_kept.device, dtype=torch.float32)
    itself = torch.arange(n_visual, device=is_kept.device)
    goes_on = torch.where(is_kept, target == itself, (target == -1) | _are_kept(target, is_kept))
    is_finite, fits = _on_host(torch.isfinite(weight).all(), goes_on.all())
    if not is_finite:
        raise ValueError(f"selector {name!r} returned NaN or infinite weights.")
    if not fits:
        raise ValueError(f"selector {name!r}: merge_target must be -1 or a kept row, and a kept row's own index.")
    return target, weight


def _checked_recycled(selection: Selection, is_kept: Tensor, name: str) -> Tensor | None:
    recycled_idx = selection.recycled_idx
    if recycled_idx is None:
        return None
    if not _is_whole(recycled_idx):
        raise TypeError(f"selector {name!r}: recycled_idx must be a tensor of whole indices, got {recycled_idx!r}.")
    if recycled_idx.ndim != 1:
        raise ValueError(f"selector {name!r}: recycled_idx must have one dimension, got {tuple(recycled_idx.shape)}.")
    recycled_idx = recycled_idx.to(device=is_kept.device, dtype=torch.long)
    ordered = recycled_idx.sort().values
    are_part, distinct = _on_host(_are_kept(recycled_idx, is_kept).all(), (ordered[1:] > ordered[:-1]).all())
    if not are_part:
        raise ValueError(f"selector {name!r}: recycled_idx is not a part of keep_idx.")
    if not distinct:
        raise ValueError(f"selector {name!r}: recycled_idx holds a row twice.")
    return recycled_idx


def _are_kept(rows: Tensor, is_kept: Tensor) -> Tensor:
    n_visual = is_kept.shape[0]
    return (rows >= 0) & (rows < n_visual) & is_kept[rows.clamp(0, n_visual - 1)]


def _on_host(*conditions: Tensor) -> list[bool]:
    """Conditions of the device, in one synchronisation."""
    return torch.stack(conditions).tolist()


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _WHOLE
