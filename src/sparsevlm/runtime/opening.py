"""Opens a request: from the inputs of a prompt to samples with a budget each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import cache_of
from ..models import Grid
from . import prompt
from .planning import plan_samples
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
    request.begin_prompt(prompt.make_samples(session.adapter, inputs, mask, grids, session.template, n_drafted))
    plan_samples(session.adapter, request, inputs.get("input_ids"))
    _warn(session, request)
    return request


def _warn(session: Session, request: Request) -> None:
    counts = sorted({sample.visual.shape[0] for sample in request.samples if sample.visual.shape[0]})
    n_vis = request.config.n_vis
    if n_vis is not None and counts != [n_vis]:
        message = f"n_vis={n_vis} was announced, the inputs hold {counts} visual tokens: these are used."
        session.warn_once("n_vis", message)
    for sample in request.samples:
        if sample.plan is not None and sample.plan.clamped:
            session.warn_once("budget", sample.plan.clamped + " (said once; see the reports).")
