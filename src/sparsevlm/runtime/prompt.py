"""Reads a forward's inputs: where the visual tokens are, which text may vote, what each sample's budget is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import SparseVLMConfig
from ..selection.budget import least_keep, plan_budget, plan_schedule
from ..selection.context import BEFORE_DECODER, EVERYWHERE, TARGET_LAYERS, VISION_NEEDS, SelectorTraits
from ..template import Template
from .request import Request, Sample
from .view import ModelView

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def visual_masks(view: ModelView, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which tokens of the forward stand for image or video features, per kind that it brings.

    Only a forward that brings pixels (or features computed from them) has visual tokens: a model can generate the
    placeholder ids itself.

    Parameters
    ----------
    view : ModelView
    inputs : mapping
        Keyword arguments of the base model.

    Returns
    -------
    dict of Tensor of shape (batch, q_len), bool
        By ``"image"``, ``"video"``.

    Raises
    ------
    ValueError
        If there are pixels, but no token to hold them.
    """
    encoded = inputs.get("mm_encoder_outputs") or {}
    brought = [kind for kind, name in PIXELS.items() if inputs.get(name) is not None or encoded.get(kind) is not None]
    ids = {"image": view.image_token_id, "video": view.video_token_id}
    input_ids = inputs.get("input_ids")
    masks = {}
    for kind in brought:
        if input_ids is not None:
            found = input_ids == ids[kind]
        else:
            embedding: Any = view.model.get_input_embeddings()
            placeholder = embedding(torch.tensor(ids[kind], device=embedding.weight.device))
            found = (inputs["inputs_embeds"] == placeholder).all(dim=-1)
        if not bool(found.any()):
            raise ValueError(
                f"the inputs bring {kind} features but no {kind} token (id {ids[kind]}) to put them in. Build the "
                "prompt with the processor, e.g. processor.apply_chat_template, so that it holds the placeholders."
            )
        masks[kind] = found
    return masks


def visual_grids(view: ModelView, inputs: Mapping[str, Any], input_ids: Tensor | None) -> list[list[Grid]]:
    """Merged grid (t, h, w) of each image or video, per sample in prompt order; empty where it cannot be told.

    Grids may be those of a batch before it was expanded for beams: then every group of equal rows shares them.
    """
    if input_ids is None:
        return []
    side = view.spatial_merge_size
    grids: dict[int, list[Grid]] = {}
    for name, token_id in (("image_grid_thw", view.image_token_id), ("video_grid_thw", view.video_token_id)):
        given = inputs.get(name)
        grids[token_id] = [] if given is None else [(t, h // side, w // side) for t, h, w in given.tolist()]
    rows = input_ids.tolist()
    for copies in (n for n in range(1, len(rows) + 1) if len(rows) % n == 0):
        found = _grids_of_rows(rows[::copies], grids)
        if found is not None:
            return [row for row in found for _ in range(copies)]
    return []


def _grids_of_rows(rows: list[list[int]], grids: dict[int, list[Grid]]) -> list[list[Grid]] | None:
    """Hand out the grids in order of the placeholders, or ``None`` if the numbers do not fit."""
    queues = {token_id: list(found) for token_id, found in grids.items()}
    per_row: list[list[Grid]] = []
    for row in rows:
        per_row.append([])
        position = 0
        while position < len(row):
            token_id = row[position]
            if token_id not in queues:
                position += 1
                continue
            if not queues[token_id]:
                return None
            grid = queues[token_id].pop(0)
            size = grid[0] * grid[1] * grid[2]
            if row[position : position + size] != [token_id] * size:
                return None
            per_row[-1].append(grid)
            position += size
    return None if any(queues.values()) else per_row


def make_samples(
    view: ModelView,
    inputs: Mapping[str, Any],
    mask: Tensor,
    template: Template,
    n_drafted: int,
) -> list[Sample]:
    """Describe every sample of the batch.

    Text of a sample: its tokens without visual and special ones and without the template's. Of these, the ones after
    the last visual token may vote. Where none is left, the last token of the prompt takes the place.

    Parameters
    ----------
    view : ModelView
    inputs : mapping
        Keyword arguments of the base model.
    mask : Tensor of shape (batch, q_len), bool
        Visual tokens.
    template : Template
        Token ids that the chat template puts around a prompt.
    n_drafted : int
        Tokens at the end that are guesses of assisted decoding, not prompt; they never vote.

    Raises
    ------
    ValueError
        If a prompt ends in a visual token: the row that predicts the next token must not be dropped.
    """
    q_len = mask.shape[1]
    valid = torch.ones(mask.shape, dtype=torch.bool, device="cpu")
    attention_mask = inputs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        valid = attention_mask[:, -q_len:].bool().cpu()
    input_ids = inputs.get("input_ids")
    ids = None if input_ids is None else input_ids.cpu()
    special_ids = sorted(view.special_token_ids | {view.image_token_id, view.video_token_id})
    special = torch.tensor(special_ids, device="cpu")
    on_cpu = mask.cpu() & valid
    grids = visual_grids(view, inputs, ids)
    samples = []
    for b in range(mask.shape[0]):
        visual = on_cpu[b].nonzero().squeeze(-1)
        other = (valid[b] & ~on_cpu[b]).nonzero().squeeze(-1)
        prompt_end = q_len - n_drafted
        text = other[other < prompt_end]
        if ids is not None:
            text = _without_template(text, ids[b], template)
            text = text[~torch.isin(ids[b][text], special)]
        voters = text[text > (int(visual[-1]) if visual.numel() else -1)]
        last = valid[b, :prompt_end].nonzero().squeeze(-1)[-1:]
        if visual.numel() and int(visual[-1]) == int(last):
            raise ValueError(
                f"sample {b} ends in a visual token, whose row has to predict the next token and cannot be judged. End "
                "the prompt in text: a chat template closes an image with <|vision_end|>."
            )
        sample = Sample(
            visual=visual,
            other=other,
            text=text if text.numel() else last,
            voters=voters if voters.numel() else last,
            last=last,
            alive=torch.arange(visual.shape[0], device="cpu"),
            tail=_tail_length(visual, other, q_len),
            grids=tuple(grids[b]) if grids else (),
        )
        sample.to(mask.device)
        samples.append(sample)
    return samples


def _tail_length(visual: Tensor, other: Tensor, q_len: int) -> int:
    """Contiguous tokens at the end of the sequence, behind the last visual one."""
    tail = other[other > (int(visual[-1]) if visual.numel() else -1)]
    if tail.numel() == 0 or int(tail[-1]) != q_len - 1:
        return 0
    gaps = (tail.diff() != 1).nonzero()
    return int(tail.numel() - (gaps[-1] + 1 if gaps.numel() else 0))


def _without_template(text: Tensor, ids: Tensor, template: Template) -> Tensor:
    """Leave out what the template puts around a prompt, each end where it is all there."""
    found = tuple(ids[text].tolist())
    start = len(template.prefix) if found[: len(template.prefix)] == template.prefix else 0
    n_suffix = len(template.suffix)
    end = len(found) - n_suffix if n_suffix and found[-n_suffix:] == template.suffix else len(found)
    return text[start:end]


def plan_samples(view: ModelView, request: Request, input_ids: Tensor | None) -> None:
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
            sample.plan = plan_budget(budget, schedule, n_left, target_layers, view.n_layers, config.min_keep)
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


def resolved_target_layers(view: ModelView, config: SparseVLMConfig, traits: SelectorTraits) -> tuple[int, ...]:
    """Target layers in force: the given ones or every 4th from layer 2; for a selector before the decoder -1, alone or
    in front of them.

    Raises
    ------
    ValueError
        If a layer is out of range, or the budget cannot hold on these layers.
    """
    n_layers = view.n_layers
    if traits.placement != TARGET_LAYERS and config.keep is None and isinstance(config.schedule, (str, type(None))):
        raise ValueError(f"selector {traits.name!r} runs before the decoder, where no rank is known: set keep.")
    if traits.placement == BEFORE_DECODER:
        if config.target_layers is not None:
            raise ValueError(f"selector {traits.name!r} runs before the decoder: leave target_layers unset.")
        return (-1,)
    layers = tuple(config.target_layers) if config.target_layers is not None else tuple(range(2, n_layers - 1, 4))
    if not layers:
        raise ValueError(
            f"{view.name} has {n_layers} decoder layers, too few for the default target layers (every 4th from 2); "
            f"name target_layers in 0..{n_layers - 2}."
        )
    if outside := [layer for layer in layers if layer > n_layers - 2]:
        raise ValueError(
            f"target_layers {outside} are out of range: {view.name} has {n_layers} decoder layers, and tokens can be "
            f"dropped after layers 0..{n_layers - 2}."
        )
    return (-1, *layers) if traits.placement == EVERYWHERE else layers


def check_needs(view: ModelView, traits: SelectorTraits) -> None:
    """Refuse a selector that asks for what the model does not have.

    Raises
    ------
    NotImplementedError
    """
    if traits.needs & VISION_NEEDS and not view.vision_attentions:
        raise NotImplementedError(
            f"selector {traits.name!r} needs {', '.join(sorted(traits.needs & VISION_NEEDS))}, which is read in blocks "
            f"with full attention, and the vision tower of this {view.name} has none. Choose another selector."
        )


def check_budget(view: ModelView, config: SparseVLMConfig, target_layers: tuple[int, ...]) -> None:
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
    dense = least_keep(target_layers, view.n_layers)
    for keep in budgets:
        fraction = keep
        if isinstance(keep, int) and config.n_vis:
            fraction = keep / config.n_vis
        if isinstance(fraction, float) and fraction < dense:
            raise ValueError(
                f"keep={keep} cannot hold on target layers {target_layers} of {view.n_layers}: layers "
                f"0..{target_layers[0]} see every visual token, so the average is at least {dense:.3f} (plus what "
                f"min_keep={config.min_keep} takes). Feasible: keep in ({dense:.3f}, 1.0]; or choose earlier layers."
            )


def warn_once(seen: set[str], kind: str, message: str) -> None:
    """Log the first warning of a kind."""
    if kind not in seen:
        seen.add(kind)
        logger.warning(message)
