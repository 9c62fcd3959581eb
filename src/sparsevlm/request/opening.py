"""Opens a request: from the inputs of a prompt to samples with a budget each."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..compat import cache_of
from ..models import RECURRENT, Layout, ModelAdapter, Tiles, n_tokens, separators
from ..selection.budget import Plan, clamped_floors, nothing_to_drop, plan_budget, plan_schedule
from ..template import Template
from .inputs import check_mask, visual_grids
from .request import Request
from .sample import Sample
from .session import Session
from .tensor_parallel import check_alike

IntArray = npt.NDArray[np.int64]


def open_request(
    session: Session,
    inputs: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    layouts: Mapping[str, Sequence[Layout] | None],
    logits_to_keep: int = 1,
) -> Request:
    """Begin the request of a prompt with images or videos, or go on with it where ``generate`` has no cache.

    Parameters
    ----------
    session : Session
    inputs : mapping
        Keyword arguments of the base model.
    masks : mapping
        Placeholders by kind, (batch, q_len), from :func:`~.prompt.visual_masks`.
    layouts : mapping
        Of all images in order, by kind, where they are known.
    logits_to_keep : int
        Rows at the end that the caller wants logits of; 0: all.

    Raises
    ------
    ValueError
        If a prompt ends in a visual token, or a budget cannot hold (with ``strict``).
    RuntimeError
        If the ranks of a tensor-parallel model were given different requests.
    """
    mask = torch.stack(list(masks.values())).any(dim=0)
    ids, cache = inputs.get("input_ids"), cache_of(inputs)
    if (running := session.running) is not None and cache is None and running.continues_in(ids):
        running.begin_decode_step()
        inputs = {**inputs, "attention_mask": _mask_of_tokens(inputs.get("attention_mask"), 0, mask.shape)}
        samples = make_samples(session.adapter, inputs, mask, layouts, session.template, 0)
        return running.step_without_cache(samples, mask.shape[1])
    request = session.new_request(cache, mask.shape[0], mask.shape[1], logits_to_keep)
    if session.in_generate and cache is None and ids is not None:
        request.comes_again(ids)
    # Assisted decoding appends drafts to the prompt and asks for their logits and the one before them, if it can.
    n_drafted = max(0, logits_to_keep - 1) if session.is_drafting else 0
    if session.is_drafting and not logits_to_keep:
        n_drafted = request.past_len + mask.shape[1] - session.n_given
    if session.in_generate:
        inputs = {
            **inputs,
            "attention_mask": _mask_of_tokens(inputs.get("attention_mask"), request.past_len, mask.shape),
        }
    request.begin_prompt(make_samples(session.adapter, inputs, mask, layouts, session.template, n_drafted))
    plan_samples(session.adapter, request)
    _warn(session, request)
    if request.tp_group is not None:
        check_alike(request, session.adapter.decoder.embed.weight.device)
    return request


def check_fillers(adapter: ModelAdapter, request: Request) -> None:
    """Refuse a later turn of a batch where layers are recurrent: fillers of unequal rows would pass through a state.

    Raises
    ------
    NotImplementedError
    """
    if request.past_len and request.batch > 1 and RECURRENT in adapter.decoder.layer_types:
        raise NotImplementedError(
            f"{request.batch} samples bring images on a kept cache, and the {adapter.name} has recurrent layers, whose "
            "state the fillers of samples that keep unequal numbers would change. Go on with one sample at a time, or "
            "run this turn inside state.options(keep=1.0)."
        )


def _mask_of_tokens(attention_mask: Any, past_len: int, shape: tuple[int, ...]) -> Any:
    """Mask of a pass's tokens, (batch, q_len), if ``generate`` has made one of queries and keys of it, as it does for a
    static cache: the last query sees all that is not padding."""
    made = attention_mask.get("full_attention") if isinstance(attention_mask, Mapping) else attention_mask
    if not isinstance(made, Tensor) or made.ndim != 4:
        return attention_mask
    seen = made[:, 0, -1, past_len : past_len + shape[1]]
    return (seen if seen.dtype == torch.bool else seen == 0).expand(shape)


def make_samples(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    mask: Tensor,
    layouts: Mapping[str, Sequence[Layout] | None],
    template: Template,
    n_drafted: int,
) -> list[Sample]:
    """Describe every sample of the batch.

    Text of a sample: its tokens without visual and special ones and without the template's. Of these, the ones after
    the last visual token may vote. Where none is left, the last token of the prompt takes the place.

    Parameters
    ----------
    adapter : ModelAdapter
    inputs : mapping
        Keyword arguments of the base model.
    mask : Tensor of shape (batch, q_len), bool
        Visual tokens.
    layouts : mapping
        Of all images of the batch in order, by kind, where they are known.
    template : Template
        Token ids that the chat template puts around a prompt.
    n_drafted : int
        Tokens at the end that are guesses of assisted decoding, not prompt; they never vote.

    Raises
    ------
    ValueError
        If a prompt ends in a visual token: the row that predicts the next token must not be dropped. If a guess is a
        placeholder, or a mask hides all of a sample.
    """
    q_len = mask.shape[1]
    seen = torch.ones(mask.shape, dtype=torch.bool, device="cpu")
    attention_mask = inputs.get("attention_mask")
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        seen = attention_mask[:, -q_len:].bool().cpu()
    check_mask(seen)
    input_ids = inputs.get("input_ids")
    ids = None if input_ids is None else input_ids.cpu()
    is_special = None if ids is None else torch.isin(ids, adapter.token_ids_apart).numpy()
    # Arrays from here on: of so few numbers, operations of torch take ten times as long.
    valid = seen.numpy()
    placeholders = mask.cpu().numpy()
    is_visual = placeholders.copy()
    by_row = visual_grids(adapter, layouts, ids)
    _protect_separators(adapter, is_visual, by_row)
    is_visual &= valid  # layouts tell of hidden placeholders as well
    prompt_end = q_len - n_drafted
    _check_drafts(adapter, is_visual[:, prompt_end:])
    goes_on = valid.copy()
    goes_on[:, prompt_end - 1 :] = True  # what predicts the next token, even if it is hidden from all others
    samples = []
    for b in range(mask.shape[0]):
        visual = is_visual[b].nonzero()[0]
        other = (goes_on[b] & ~is_visual[b]).nonzero()[0]
        text = (valid[b, :prompt_end] & ~is_visual[b, :prompt_end]).nonzero()[0]
        if ids is not None and is_special is not None:
            text = text[template.within(ids[b].numpy()[text].tolist())]
            text = text[~is_special[b, text]]
        last_visual = int(visual[-1]) if visual.size else -1
        rater_candidates = text[text > last_visual]
        last = valid[b, :prompt_end].nonzero()[0][-1:]
        if visual.size and last_visual == int(last[-1]):
            raise ValueError(
                f"sample {b} ends in a visual token, whose row has to predict the next token and cannot be judged. End "
                "the prompt in text: a chat template closes an image with <|vision_end|>."
            )
        sample = Sample(
            visual=torch.from_numpy(visual),
            other=torch.from_numpy(other),
            text=torch.from_numpy(text if text.size else last),
            rater_candidates=torch.from_numpy(rater_candidates if rater_candidates.size else last),
            last=torch.from_numpy(last),
            alive=torch.from_numpy(np.arange(visual.size)),
            tail=_tail_length(other[other > last_visual], q_len),
            layouts=tuple(by_row[b]) if by_row else (),
            image_sizes=_image_sizes(
                is_visual[b], placeholders[b], None if ids is None else ids[b].numpy(), by_row[b] if by_row else ()
            ),
        )
        sample.to(mask.device)
        samples.append(sample)
    return samples


def _protect_separators(
    adapter: ModelAdapter, is_visual: npt.NDArray[np.bool_], by_row: Sequence[Sequence[Layout]]
) -> None:
    """Take what stands for no patch out of a mask of placeholders, (batch, q_len), where the family says so."""
    for mask, layouts in zip(is_visual, by_row, strict=False):
        if any(isinstance(layout, Tiles) for layout in layouts) and adapter.family.protects_separators:
            mask[mask.nonzero()[0]] = ~torch.cat([separators(layout) for layout in layouts]).numpy()


def _image_sizes(
    is_visual: npt.NDArray[np.bool_],
    placeholders: npt.NDArray[np.bool_],
    ids: IntArray | None,
    layouts: Sequence[Layout],
) -> tuple[int, ...]:
    """Visual tokens of each image: by the layouts, or by runs of the same token where these are unknown."""
    sizes = [n_tokens(layout) for layout in layouts]
    if layouts and sum(sizes) == int(placeholders.sum()):
        of_image = np.repeat(np.arange(len(sizes)), sizes)
        return tuple(np.bincount(of_image[is_visual[placeholders]], minlength=len(sizes)).tolist())
    visual = is_visual.nonzero()[0]
    begins = np.diff(visual) != 1
    if ids is not None:
        begins |= np.diff(ids[visual]) != 0
    ends = [0, *(np.flatnonzero(begins) + 1).tolist(), visual.shape[0]]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def _check_drafts(adapter: ModelAdapter, is_visual: npt.NDArray[np.bool_]) -> None:
    """Refuse drafted tokens of which any stands for visual features."""
    if is_visual.any():
        tokens = sorted(modality.token_id for modality in adapter.modalities.values())
        raise ValueError(
            "the drafted tokens hold placeholders of images or videos, for which there are no features. Pass "
            f"suppress_tokens={tokens} to generate, so that they are not drafted, or do not draft."
        )


def _tail_length(tail: IntArray, q_len: int) -> int:
    """Contiguous tokens at the end of the sequence, of those behind the last visual one."""
    if tail.size == 0 or tail[-1] != q_len - 1:
        return 0
    gaps = (tail[1:] - tail[:-1] != 1).nonzero()[0]
    return int(tail.size - (gaps[-1] + 1 if gaps.size else 0))


def _warn(session: Session, request: Request) -> None:
    counts = sorted({sample.visual.shape[0] for sample in request.samples if sample.visual.shape[0]})
    n_vis = request.config.n_vis
    if n_vis is not None and counts != [n_vis]:
        message = f"n_vis={n_vis} was expected, the inputs hold {counts} visual tokens: these are used."
        if request.config.keep is None and counts and n_vis < counts[0]:
            message += f" n_vis is no budget: to keep {n_vis} tokens, pass keep={n_vis}."
        session.warn_once("n_vis", message)
    warn_clamped(session, request)


def warn_clamped(session: Session, request: Request) -> None:
    """Log the first budget or floor that could not hold."""
    for sample in request.samples:
        for clamped in (*sample.clamped, None if sample.plan is None else sample.plan.clamped):
            if clamped:
                session.warn_once("budget", clamped + " (said once; see the reports).")


def plan_samples(adapter: ModelAdapter, request: Request) -> None:
    """Give every sample of a request the counts of its budget.

    Raises
    ------
    ValueError
        With ``strict``, where a budget cannot hold; with per-sample budgets, where their number does not fit.
    """
    config, target_layers = request.config, request.target_layers
    budgets = per_sample_budgets(config.keep, request.batch, request.copies)
    schedule = config.schedule or request.traits.default_schedule
    for sample, keep in zip(request.samples, budgets, strict=True):
        n_visual, n_left = sample.visual.shape[0], sample.alive.shape[0]
        if not isinstance(schedule, str):
            plan = plan_schedule(schedule, n_visual, len(target_layers), config.min_keep)
            sample.plan = plan.at_most(n_left)
            if sample.plan.counts != plan.counts:
                sample.plan = sample.plan.and_clamped(
                    f"schedule {tuple(schedule)} asks for more than the {n_left} of {n_visual} visual tokens that "
                    f"vision_keep={config.vision_keep} leaves: {sample.plan.counts} used"
                )
        elif keep is not None:
            sample.plan = _plan_of_budget(request, sample, keep, schedule, adapter.n_layers)
        if sample.plan is None:
            continue
        sample.plan = sample.plan.and_clamped(_clamped_floors(request, sample, sample.plan))
        if sample.plan.clamped and config.strict:
            raise ValueError(f"{sample.plan.clamped} (strict=True refuses this).")


def _plan_of_budget(request: Request, sample: Sample, keep: int | float, schedule: str, n_layers: int) -> Plan:
    """Counts of a budget in the tokens of the whole images, of which the vision tower may have left out some."""
    config, n_visual, n_left = request.config, sample.visual.shape[0], sample.alive.shape[0]
    budget = keep
    if 0 < n_left < n_visual:
        wanted = keep if isinstance(keep, int) else keep * n_visual
        budget = keep if isinstance(keep, int) else min(1.0, wanted / n_left)
        if int(wanted + 1e-6) > n_left:
            clamped = (
                f"keep={keep} ({wanted:.1f} tokens on average) is more than the {n_left} of {n_visual} visual tokens "
                f"that vision_keep={config.vision_keep} leaves: all of these are kept"
            )
            return Plan((n_left,) * len(request.target_layers), float(n_left), clamped)
    return plan_budget(budget, schedule, n_left, request.target_layers, n_layers, config.min_keep)


def _clamped_floors(request: Request, sample: Sample, plan: Plan) -> str | None:
    """Why the floors of a sample's images do not fit at the first target layer where they do not, if any."""
    config, n_left = request.config, sample.alive.shape[0]
    if len(sample.image_sizes) < 2:
        return None
    for layer, count in zip(request.target_layers, plan.counts, strict=True):
        if nothing_to_drop(n_left, count, config.min_keep) is not None:
            continue
        n_left = count
        clamped = clamped_floors(sample.n_per_image, count, config.min_keep_per_image, layer)
        if clamped is not None:
            return clamped
    return None


def per_sample_budgets(keep: Any, batch: int, copies: int) -> list[Any]:
    """One budget per row of the batch, of which ``copies`` each are beams or returned sequences of one prompt.

    Raises
    ------
    ValueError
        If a list of budgets does not hold one per prompt.
    """
    if not isinstance(keep, tuple):
        return [keep] * batch
    if len(keep) * copies != batch:
        of_copies = f" ({batch} rows in {copies} copies each)" if copies > 1 else ""
        raise ValueError(
            f"keep holds {len(keep)} budgets for a batch of {batch // copies} samples{of_copies}. Give one budget per "
            "sample, or a single one for all."
        )
    return [value for value in keep for _ in range(copies)]
