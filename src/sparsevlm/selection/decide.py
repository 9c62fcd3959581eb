"""One decision: from attention to the tokens that go on, for one sample at one target layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .budget import rank_adaptive_count
from .check import checked_selection
from .context import Selection, SelectionContext, Selector, SelectorTraits
from .rank import sketch_rank


@dataclass(frozen=True)
class Decision:
    """Outcome for one sample: the selection (``None``: nothing is dropped), the rank that decided, and the reason
    for doing nothing."""

    selection: Selection | None
    rank: int | None = None
    skipped_because: str | None = None


def decide(context: SelectionContext, selector: Selector, traits: SelectorTraits, n_keep: int | None) -> Decision:
    """Run the budget policy and the selector.

    Parameters
    ----------
    context : SelectionContext
        With ``rater_attention`` where the selector needs it or ``n_keep`` is ``None``.
    selector : Selector
    traits : SelectorTraits
    n_keep : int or None
        Tokens that leave the layer, or ``None`` for the rank-adaptive count.

    Raises
    ------
    ValueError, TypeError
        If the selector's answer is ill-formed, or the attention or the states hold NaN.
    """
    config, n_visual = context.config, context.n_visual
    if n_visual <= config.min_keep:
        return Decision(None, None, f"{n_visual} visual tokens are not more than min_keep={config.min_keep}")
    rank = None
    if n_keep is None:
        assert context.rater_attention is not None
        rank = sketch_rank(context.rater_attention, config.rank_tolerance)
        n_keep, n_clusters = rank_adaptive_count(
            n_visual, rank, config.rank_lambda, config.tau, config.theta,
            config.recycle and traits.recycles, config.min_keep,
        )  # fmt: skip
        if traits.recycles:
            context = dataclasses.replace(context, n_clusters=n_clusters)
        if n_keep >= n_visual:
            why = f"rank {rank} of {n_visual} visual tokens leaves nothing to drop"
            if n_clusters:
                why = f"recycling with tau={config.tau} and theta={config.theta} puts back all that would be dropped"
            return Decision(None, rank, why)
    elif n_keep >= n_visual:
        return Decision(None, None, "the budget keeps every visual token here")
    result = selector.select(context, n_keep)
    return Decision(checked_selection(result, context.hidden_states, n_keep, traits.name), rank)
