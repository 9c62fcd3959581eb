"""Budgets: the planner of counts per target layer, and the rank rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .recycle import count_clusters

_MOST_PERCENT = 100


@dataclass(frozen=True)
class Plan:
    """Counts for one sample.

    Attributes
    ----------
    counts : tuple of int
        Visual tokens that leave each target layer, recycled ones included.
    budget : float or None
        The requested average over layer inputs, in tokens.
    clamped : str or None
        Why the request could not hold and what was done instead.
    """

    counts: tuple[int, ...]
    budget: float | None = None
    clamped: str | None = None

    def at_most(self, n_visual: int) -> Plan:
        """The same for a sample that has no more than ``n_visual`` tokens."""
        return dataclasses.replace(self, counts=tuple(min(count, n_visual) for count in self.counts))

    def and_clamped(self, reason: str | None) -> Plan:
        """The same with one more reason why the request could not hold, if there is one."""
        reasons = [one for one in (self.clamped, reason) if one]
        return dataclasses.replace(self, clamped="; ".join(reasons) or None)


def layer_tokens(n_visual: int, counts: Sequence[int], target_layers: Sequence[int], n_layers: int) -> list[int]:
    """Visual tokens at the input of each of ``n_layers`` decoder layers."""
    tokens = [n_visual] * n_layers
    for target, count in zip(target_layers, counts, strict=True):
        tokens[target + 1 :] = [count] * (n_layers - target - 1)
    return tokens


def least_keep(target_layers: Sequence[int], n_layers: int) -> float:
    """Smallest ``keep`` fraction that the target layers allow for any image: those up to the first see everything."""
    return (target_layers[0] + 1) / n_layers


def plan_budget(
    keep: int | float, schedule: str, n_visual: int, target_layers: Sequence[int], n_layers: int, min_keep: int
) -> Plan:
    """Counts whose average over layer inputs is as near to ``keep`` as whole tokens allow, never above it.

    ``"geometric"``: the same ratio at every target layer, down to ``min_keep``; ``"single"``: one cut after the
    first target layer. A budget below what the layers and ``min_keep`` allow is clamped to the least they allow, one
    above the number of tokens to all of them.

    Parameters
    ----------
    keep : int or float
        Tokens, or a fraction of ``n_visual``.
    schedule : {"geometric", "single"}
    n_visual : int
    target_layers : sequence of int
        Sorted; -1 stands for "before the decoder".
    n_layers : int
    min_keep : int

    Returns
    -------
    Plan
    """
    budget = float(keep) if isinstance(keep, int) else keep * n_visual
    floor = min(min_keep, n_visual)
    n_targets = len(target_layers)
    if budget >= n_visual:
        clamped = None
        if isinstance(keep, int) and keep > n_visual > 0:
            clamped = f"keep={keep} is more than the {n_visual} visual tokens of this sample: all are kept"
        return Plan((n_visual,) * n_targets, budget, clamped)
    least = sum(layer_tokens(n_visual, (floor,) * n_targets, target_layers, n_layers)) / n_layers
    if budget < least:
        clamped = _too_small(keep, budget, least, n_visual, target_layers[0], min_keep)
        return Plan((floor,) * n_targets, budget, clamped)
    total = int(budget * n_layers + 1e-6)
    spans = [
        after - before for before, after in itertools.pairwise([*(target + 1 for target in target_layers), n_layers])
    ]
    free = total - (target_layers[0] + 1) * n_visual
    if schedule == "single":
        count = max(floor, min(n_visual, free // sum(spans)))
        return Plan((count,) * n_targets, budget)
    return Plan(_geometric(n_visual, floor, spans, free), budget)


def _too_small(keep: int | float, budget: float, least: float, n_visual: int, target: int, min_keep: int) -> str:
    """Says that a budget is below the least possible, why, and what to change."""
    if n_visual <= min_keep:
        wanted = f"keep={keep} is an average of {budget:.1f} of {n_visual} visual tokens"
        return _never_pruned(wanted, min_keep) + _as_fraction(keep)
    reasons = [] if target < 0 else [f"layers 0..{target} see all of them"]
    reasons.append(f"min_keep={min_keep} leaves {min_keep}")
    changes = ["raise keep"] if target < 0 else ["raise keep", "choose earlier target_layers"]
    return (
        f"keep={keep} is an average of {budget:.1f} of {n_visual} visual tokens, less than the least possible: "
        f"{least:.1f} used, as {' and '.join(reasons)}. To change that, {', '.join(changes)} or lower min_keep"
        f"{_as_fraction(keep)}"
    )


def _never_pruned(wanted: str, min_keep: int) -> str:
    """Says that a sample loses none of its tokens, as it has no more than ``min_keep``."""
    return (
        f"{wanted}, but no sample of min_keep={min_keep} or fewer is pruned: all are kept. To change that, lower "
        "min_keep"
    )


def _as_fraction(keep: int | float) -> str:
    """Hint at the fraction that a number of tokens may have been meant as."""
    if not isinstance(keep, int) or keep > _MOST_PERCENT:
        return ""
    all_of_them = ", all of them keep=1.0" if keep == 1 else ""
    return f" (keep={keep} is a number of tokens; {keep} % of them is keep={keep / 100:g}{all_of_them})"


def below_min_keep(keep: object, min_keep: int) -> str | None:
    """Says that a number of tokens is below ``min_keep``, whatever the images; ``None``: it is not."""
    budgets = keep if isinstance(keep, tuple) else (keep,)
    small = [one for one in budgets if isinstance(one, int) and one < min_keep]
    if not small:
        return None
    return (
        f"keep={small[0]} is less than min_keep={min_keep}, which no image is pruned below: the least possible will be "
        f"used. To change that, raise keep or lower min_keep{_as_fraction(small[0])}"
    )


def _geometric(n_visual: int, floor: int, spans: list[int], free: int) -> tuple[int, ...]:
    """Largest geometric counts whose span-weighted sum stays within ``free`` tokens; the remainder goes to the
    earliest stages that can still take a token."""

    def counts_at(ratio: float) -> list[int]:
        return [max(floor, int(n_visual * ratio**power)) for power in range(1, len(spans) + 1)]

    def cost(counts: list[int]) -> int:
        return sum(span * count for span, count in zip(spans, counts, strict=True))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts_at(middle)) <= free else (low, middle)
    counts = counts_at(low)
    left = free - cost(counts)
    for stage, span in enumerate(spans):
        above = n_visual if stage == 0 else counts[stage - 1]
        extra = min(left // span, above - counts[stage], 1)
        counts[stage] += extra
        left -= extra * span
    return tuple(counts)


def plan_schedule(schedule: Sequence[int | float], n_visual: int, n_targets: int, min_keep: int) -> Plan:
    """Counts of an explicit schedule: tokens (int) or fractions of ``n_visual`` (float), at least ``min_keep``."""
    if len(schedule) != n_targets:
        raise ValueError(f"schedule has {len(schedule)} counts for {n_targets} target layers.")
    floor = min(min_keep, n_visual)
    wanted = [count if isinstance(count, int) else round(count * n_visual) for count in schedule]
    counts = tuple(min(n_visual, max(floor, count)) for count in wanted)
    clamped = None
    if any(count < floor for count in wanted) and n_visual <= min_keep:
        clamped = _never_pruned(f"schedule {tuple(schedule)} is for fewer than {n_visual} visual tokens", min_keep)
    elif any(count < floor for count in wanted):
        clamped = f"schedule {tuple(schedule)} goes below min_keep={min_keep} for {n_visual} tokens: {counts} used"
    elif any(count > n_visual > 0 for count in wanted):
        clamped = f"schedule {tuple(schedule)} asks for more than the {n_visual} visual tokens: {counts} used"
    return Plan(counts, None, clamped)


def rank_adaptive_count(
    n_visual: int, rank: int, rank_lambda: float, tau: float, theta: float, recycle: bool, min_keep: int
) -> tuple[int, int]:
    """Tokens that leave the layer when N = λ(L_v − rank) are dropped, and how many of them are clusters.

    τ and θ bind in full: L_r = ⌊τN⌋ of the dropped are recycled into C = ⌊θL_r⌋. Where the outcome would fall below
    ``min_keep``, N is the largest that keeps it. Source: paper, sparsification level adaptation and token recycling.

    Returns
    -------
    n_out, n_clusters : int
        ``n_out`` counts the clusters.
    """
    n_prune = max(0, int(rank_lambda * (n_visual - rank) + 1e-9))

    def clusters(n: int) -> int:
        return count_clusters(n, tau, theta)[1] if recycle else 0

    while n_prune and n_visual - n_prune + clusters(n_prune) < min_keep:
        n_prune -= 1
    return n_visual - n_prune + clusters(n_prune), clusters(n_prune)


def nothing_by_rank(n_visual: int, n_keep: int, n_clusters: int, rank: int, tau: float, theta: float) -> str | None:
    """Why a sample loses none of its tokens where its rank leaves :func:`rank_adaptive_count` of them; ``None``: it
    loses some."""
    if n_keep < n_visual:
        return None
    if n_clusters:
        return f"recycling with tau={tau} and theta={theta} puts back all that would be dropped"
    return f"rank {rank} of {n_visual} visual tokens leaves nothing to drop"


def nothing_to_drop(n_visual: int, n_keep: int | None, min_keep: int) -> str | None:
    """Why a sample of ``n_visual`` tokens loses none of them, ``n_keep`` (if a budget names it) of which are to go on;
    ``None``: it loses some."""
    if not n_visual:
        return "no image or video in this sample"
    if n_visual <= min_keep:
        return f"{n_visual} visual tokens are not more than min_keep={min_keep}"
    if n_keep is not None and n_keep >= n_visual:
        return f"the budget keeps all {n_visual} visual tokens that have come this far"
    return None


def clamped_floors(n_per_image: Sequence[int], n_keep: int, min_keep: int, layer: int) -> str | None:
    """Why not every image can keep its floor of ``min_keep`` tokens where ``n_keep`` go on; ``None``: each can.

    Parameters
    ----------
    n_per_image : sequence of int
        Tokens of each image of the sample.
    n_keep, min_keep : int
    layer : int
        Target layer behind which they go on; -1: before the decoder.
    """
    left = [n for n in n_per_image if n]
    needed = sum(min(n, min_keep) for n in left)
    if len(left) < 2 or needed <= n_keep:
        return None
    where = "before the decoder" if layer < 0 else f"after layer {layer}"
    return (
        f"min_keep_per_image={min_keep} takes {needed} tokens of {len(left)} images, but {n_keep} go on {where}: each "
        "image keeps an even share"
    )
