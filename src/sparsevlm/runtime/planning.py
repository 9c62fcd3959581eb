"""Budgets: which layers drop tokens, and how many go on in each sample."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import SparseVLMConfig
from ..models import ModelAdapter
from ..selection.budget import least_keep, plan_budget, plan_schedule
from ..selection.context import BEFORE_DECODER, EVERYWHERE, TARGET_LAYERS, VISION_NEEDS, SelectorTraits
from .request import Request


def plan_samples(adapter: ModelAdapter, request: Request, input_ids: Tensor | None) -> None:
    """Give every sample of a request the counts of its budget.

    Raises
    ------
    ValueError
        With ``strict``, where a budget cannot hold; with per-sample budgets, where their number does not fit.
    """
    config, target_layers = request.config, request.target_layers
    budgets = per_sample_budgets(config.keep, request.batch, input_ids)
    schedule = config.schedule or request.traits.default_schedule
    for sample, keep in zip(request.samples, budgets, strict=True):
        n_visual, n_left = sample.visual.shape[0], sample.alive.shape[0]
        if not isinstance(schedule, str):
            sample.plan = plan_schedule(schedule, n_visual, len(target_layers), config.min_keep).at_most(n_left)
        elif keep is not None:
            of_left = isinstance(keep, float) and 0 < n_left < n_visual
            budget = min(1.0, keep * n_visual / n_left) if of_left else keep
            sample.plan = plan_budget(budget, schedule, n_left, target_layers, adapter.n_layers, config.min_keep)
        if sample.plan is not None and sample.plan.clamped and config.strict:
            raise ValueError(f"{sample.plan.clamped} (strict=True refuses this).")


def per_sample_budgets(keep: Any, batch: int, input_ids: Tensor | None) -> list[Any]:
    """One budget per row of the batch; a list of budgets is repeated for beams and returned sequences, whose rows are
    copies of each other."""
    if not isinstance(keep, tuple):
        return [keep] * batch
    copies = batch // len(keep)
    fits = copies * len(keep) == batch
    if fits and copies > 1 and input_ids is not None:
        groups = input_ids.view(len(keep), copies, -1)
        fits = bool((groups == groups[:, :1]).all())
    if not fits:
        raise ValueError(f"keep holds {len(keep)} budgets for a batch of {batch} samples.")
    return [value for value in keep for _ in range(copies)]


def resolved_target_layers(adapter: ModelAdapter, config: SparseVLMConfig, traits: SelectorTraits) -> tuple[int, ...]:
    """Target layers in force: the given ones or every 4th from layer 2; for a selector before the decoder -1, alone or
    in front of them.

    Raises
    ------
    ValueError
        If a layer is out of range, or the budget cannot hold on these layers.
    """
    n_layers = adapter.n_layers
    if traits.placement != TARGET_LAYERS and config.keep is None and isinstance(config.schedule, (str, type(None))):
        raise ValueError(f"selector {traits.name!r} runs before the decoder, where no rank is known: set keep.")
    if traits.placement == BEFORE_DECODER:
        if config.target_layers is not None:
            raise ValueError(f"selector {traits.name!r} runs before the decoder: leave target_layers unset.")
        return (-1,)
    layers = tuple(config.target_layers) if config.target_layers is not None else tuple(range(2, n_layers - 1, 4))
    if not layers:
        raise ValueError(
            f"{adapter.name} has {n_layers} decoder layers, too few for the default target layers (every 4th from 2); "
            f"name target_layers in 0..{n_layers - 2}."
        )
    if outside := [layer for layer in layers if layer > n_layers - 2]:
        raise ValueError(
            f"target_layers {outside} are out of range: {adapter.name} has {n_layers} decoder layers, and tokens can "
            f"be dropped after layers 0..{n_layers - 2}."
        )
    return (-1, *layers) if traits.placement == EVERYWHERE else layers


def check_needs(adapter: ModelAdapter, traits: SelectorTraits) -> None:
    """Refuse a selector that asks for what the model does not have.

    Raises
    ------
    NotImplementedError
    """
    if traits.needs & VISION_NEEDS and not adapter.vision.readable:
        raise NotImplementedError(
            f"selector {traits.name!r} needs {', '.join(sorted(traits.needs & VISION_NEEDS))}, which is read in blocks "
            f"with full attention, and the vision tower of this {adapter.name} has none. Choose another selector."
        )


def check_budget(adapter: ModelAdapter, config: SparseVLMConfig, target_layers: tuple[int, ...]) -> None:
    """Refuse, before anything runs, a budget that no image can meet on these layers.

    Raises
    ------
    ValueError
        With the feasible range.
    """
    if not isinstance(config.schedule, (str, type(None))) and len(config.schedule) != len(target_layers):
        raise ValueError(
            f"schedule has {len(config.schedule)} counts for {len(target_layers)} target layers {target_layers} "
            "(-1 is before the decoder)."
        )
    budgets = config.keep if isinstance(config.keep, tuple) else (config.keep,)
    dense = least_keep(target_layers, adapter.n_layers)
    for keep in budgets:
        fraction = keep
        if isinstance(keep, int) and config.n_vis:
            fraction = keep / config.n_vis
        if isinstance(fraction, float) and fraction < dense:
            raise ValueError(
                f"keep={keep} cannot hold on target layers {target_layers} of {adapter.n_layers}: layers "
                f"0..{target_layers[0]} see every visual token, so the average is at least {dense:.3f} (plus what "
                f"min_keep={config.min_keep} takes). Feasible: keep in ({dense:.3f}, 1.0]; or choose earlier layers."
            )
