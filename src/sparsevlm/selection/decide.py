"""One decision: from attention to the tokens that go on, for samples at one target layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .budget import rank_adaptive_count
from .check import checked_selection
from .context import Selection, SelectionContext, Selector, SelectorTraits
from .rank import sketch_rank

# Elements of the states that a selector is given at once: 64 Mi float32 = 256 MiB.
_MAX_BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Decision:
    """Outcome for one sample: the selection (``None``: nothing is dropped), the rank that decided, and the reason
    for doing nothing."""

    selection: Selection | None
    rank: int | None = None
    skipped_because: str | None = None


@dataclass(frozen=True)
class _Count:
    """What the budget policy says of one sample; ``context`` tells the selector the number of clusters."""

    context: SelectionContext
    n_keep: int
    rank: int | None = None


def decide(
    contexts: Sequence[SelectionContext], selector: Selector, traits: SelectorTraits, n_keeps: Sequence[int | None]
) -> list[Decision]:
    """Run the budget policy and the selector.

    Samples of which equally many tokens are left, and are to go on, come to the selector together if it has
    ``select_batch``.

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
    counts = [_count(context, traits, n_keep) for context, n_keep in zip(contexts, n_keeps, strict=True)]
    decisions = {i: count for i, count in enumerate(counts) if isinstance(count, Decision)}
    for group in _groups({i: count for i, count in enumerate(counts) if isinstance(count, _Count)}, selector):
        for i, result in zip(group, _select(selector, list(group.values()), traits.name), strict=True):
            selection = checked_selection(result, contexts[i].hidden_states, group[i].n_keep, traits.name)
            decisions[i] = Decision(selection, group[i].rank)
    return [decisions[i] for i in range(len(contexts))]


def _count(context: SelectionContext, traits: SelectorTraits, n_keep: int | None) -> _Count | Decision:
    config, n_visual = context.config, context.n_visual
    if n_visual <= config.min_keep:
        return Decision(None, None, f"{n_visual} visual tokens are not more than min_keep={config.min_keep}")
    if n_keep is not None:
        if n_keep >= n_visual:
            return Decision(None, None, "the budget keeps every visual token here")
        return _Count(context, n_keep)
    assert context.rater_attention is not None
    rank = sketch_rank(context.rater_attention, config.rank_tolerance)
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
    return _Count(context, n_keep, rank)


def _groups(counts: dict[int, _Count], selector: Selector) -> list[dict[int, _Count]]:
    """Samples, by their places, that a selector can answer at once."""
    if not hasattr(selector, "select_batch"):
        return [{i: count} for i, count in counts.items()]
    groups: dict[tuple[int, int], list[dict[int, _Count]]] = {}
    for i, count in counts.items():
        states = count.context.hidden_states
        alike = groups.setdefault((states.shape[0], count.n_keep), [{}])
        if (len(alike[-1]) + 1) * states.numel() > _MAX_BATCH_ELEMENTS and alike[-1]:
            alike.append({})
        alike[-1][i] = count
    return [group for alike in groups.values() for group in alike]


def _select(selector: Selector, counts: list[_Count], name: str) -> list[Any]:
    if not hasattr(selector, "select_batch"):
        return [selector.select(count.context, count.n_keep) for count in counts]
    results = list(selector.select_batch([count.context for count in counts], counts[0].n_keep))
    if len(results) != len(counts):
        raise ValueError(f"selector {name!r}: select_batch returned {len(results)} results for {len(counts)} samples.")
    return results
