"""Opens a request: from the inputs of a prompt to samples with a budget each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import cache_of
from ..models import Grid, ModelAdapter
from ..selection.budget import plan_budget, plan_schedule
from .inputs import make_samples
from .request import Request
from .session import Session


def open_request(
    session: Session,
    inputs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    grids: Mapping[str, Sequence[Grid] | None],
    logits_to_keep: int = 1,
) -> Request:
    """Begin the request of a prompt with images or videos.

    Parameters
    ----------
    session : Session
    inputs : mapping
        Keyword arguments of the base model.
    masks : mapping
        Placeholders by kind, (batch, q_len), from :func:`~.prompt.visual_masks`.
    grids : mapping
        Of all images in order, by kind, where they are known.
    logits_to_keep : int
        Rows at the end that the caller wants logits of; 0: all.

    Raises
    ------
    ValueError
        If a prompt ends in a visual token, or a budget cannot hold (with ``strict``).
    """
    mask = torch.stack(list(masks.values())).any(dim=0)
    request = session.new_request(cache_of(inputs), mask.shape[0], mask.shape[1], logits_to_keep)
    # Assisted decoding appends drafts to the prompt and asks for their logits and the one before them.
    n_drafted = max(0, logits_to_keep - 1) if session.is_drafting else 0
    request.begin_prompt(make_samples(session.adapter, inputs, mask, grids, session.template, n_drafted))
    plan_samples(session.adapter, request, inputs.get("input_ids"))
    _warn(session, request)
    return request


def _warn(session: Session, request: Request) -> None:
    counts = sorted({sample.visual.shape[0] for sample in request.samples if sample.visual.shape[0]})
    n_vis = request.config.n_vis
    if n_vis is not None and counts != [n_vis]:
        message = f"n_vis={n_vis} was expected, the inputs hold {counts} visual tokens: these are used."
        session.warn_once("n_vis", message)
    for sample in request.samples:
        if sample.plan is not None and sample.plan.clamped:
            session.warn_once("budget", sample.plan.clamped + " (said once; see the reports).")


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
