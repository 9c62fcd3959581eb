"""One decision: from attention to the tokens that go on, for samples at one target layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .budget import rank_adaptive_count
from .check import checked_selection
from .context import Selection, SelectionContext, Selector, SelectorTraits
from .rank import sketch_ranks

# Elements of the states that a selector is given at once: 32 Mi float32 = 128 MiB.
_MAX_BATCH_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Decision:
    """Outcome for one sample: the selection (``None``: nothing is dropped), the rank that decided, and the reason
    for doing nothing."""

    selection: Selection | None
    rank: int | None = None
    skipped_because: str | None = None


@dataclass(frozen=True)
class _Task:
    """What the selector is asked for one sample."""

    context: SelectionContext
    n_keep: int
    rank: int | None = None


def decide(
    contexts: Sequence[SelectionContext], selector: Selector, traits: SelectorTraits, n_keeps: Sequence[int | None]
) -> list[Decision]:
    """Run the budget policy and the selector.

    Samples of which equally many tokens are left, and are to go on, come to a selector with ``select_batch`` together.

    Parameters
    ----------
    contexts : sequence of SelectionContext
        With ``rater_attention`` where the selector needs it or the sample's ``n_keep`` is ``None``.
    selector : Selector
    traits : SelectorTraits
    n_keeps : sequence of int or None
        Tokens of each sample that leave the layer, or ``None`` for the rank-adaptive count.

    Returns
    -------
    list of Decision
        One per sample.

    Raises
    ------
    ValueError, TypeError
        If the selector's answer is ill-formed, or the attention or the states hold NaN.
    """
    given = list(zip(contexts, n_keeps, strict=True))
    ranks = _ranks(given)
    policy = [_apply_budget(context, traits, n_keep, ranks.get(i)) for i, (context, n_keep) in enumerate(given)]
    decisions = {i: one for i, one in enumerate(policy) if isinstance(one, Decision)}
    tasks = {i: one for i, one in enumerate(policy) if isinstance(one, _Task)}
    for group in _alike(tasks) if traits.batched else [[i] for i in tasks]:
        for i, result in zip(group, _select(selector, traits, [tasks[i] for i in group]), strict=True):
            selection = checked_selection(result, contexts[i].hidden_states, tasks[i].n_keep, traits.name)
            decisions[i] = Decision(selection, tasks[i].rank)
    return [decisions[i] for i in range(len(contexts))]


def nothing_to_drop(n_visual: int, n_keep: int | None, min_keep: int) -> str | None:
    """Why a sample of ``n_visual`` tokens loses none of them, ``n_keep`` (if a budget names it) of which are to go on;
    ``None``: it loses some."""
    if not n_visual:
        return "no image or video in this sample"
    if n_visual <= min_keep:
        return f"{n_visual} visual tokens are not more than min_keep={min_keep}"
    if n_keep is not None and n_keep >= n_visual:
        return "the budget keeps every visual token here"
    return None


def _ranks(given: list[tuple[SelectionContext, int | None]]) -> dict[int, int]:
    """Ranks of the rater attention, by the places of the samples whose counts they decide."""
    places, matrices = [], []
    for i, (context, n_keep) in enumerate(given):
        if n_keep is None and nothing_to_drop(context.n_visual, None, context.config.min_keep) is None:
            assert context.rater_attention is not None
            places.append(i)
            matrices.append(context.rater_attention)
    if not places:
        return {}
    return dict(zip(places, sketch_ranks(matrices, given[places[0]][0].config.rank_tolerance), strict=True))


def _apply_budget(
    context: SelectionContext, traits: SelectorTraits, n_keep: int | None, rank: int | None
) -> _Task | Decision:
    config, n_visual = context.config, context.n_visual
    if (why := nothing_to_drop(n_visual, n_keep, config.min_keep)) is not None:
        return Decision(None, None, why)
    if n_keep is not None:
        return _Task(context, n_keep)
    assert rank is not None
    n_keep, n_clusters = rank_adaptive_count(
        n_visual, rank, config.rank_lambda, config.tau, config.theta,
        config.recycle and traits.recycles, config.min_keep,
    )  # fmt: skip
    if n_keep >= n_visual:
        why = f"rank {rank} of {n_visual} visual tokens leaves nothing to drop"
        if n_clusters:
            why = f"recycling with tau={config.tau} and theta={config.theta} puts back all that would be dropped"
        return Decision(None, rank, why)
    if traits.recycles:
        context = dataclasses.replace(context, n_clusters=n_clusters)
    return _Task(context, n_keep, rank)


def _alike(tasks: dict[int, _Task]) -> list[list[int]]:
    """Places of samples that a selector can answer at once."""
    groups: dict[tuple[int, int], list[list[int]]] = {}
    for i, task in tasks.items():
        states = task.context.hidden_states
        of_this_size = groups.setdefault((states.shape[0], task.n_keep), [[]])
        if of_this_size[-1] and (len(of_this_size[-1]) + 1) * states.numel() > _MAX_BATCH_ELEMENTS:
            of_this_size.append([])
        of_this_size[-1].append(i)
    return [group for of_this_size in groups.values() for group in of_this_size]


def _select(selector: Any, traits: SelectorTraits, tasks: list[_Task]) -> list[Any]:
    if not traits.batched:
        return [selector.select(task.context, task.n_keep) for task in tasks]
    results = selector.select_batch([task.context for task in tasks], tasks[0].n_keep)
    if not isinstance(results, Iterable):
        raise TypeError(f"selector {traits.name!r}: select_batch must return one result per sample, got {results!r}.")
    results = list(results)
    if len(results) != len(tasks):
        raise ValueError(
            f"selector {traits.name!r}: select_batch returned {len(results)} results for {len(tasks)} samples."
        )
    return results
