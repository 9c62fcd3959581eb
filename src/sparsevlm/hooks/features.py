"""Visual features on their way into the decoder: taken for later turns, and put in from earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import Layout, ModelAdapter
from ..request.feature_exchange import FeatureExchange, FeaturesTakenError
from ..request.kept_features import KeptFeatures, rows_of
from ..request.request import Request
from ..request.session import Session
from ..request.step import VisionRows
from ..selection.context import VISION_NEEDS
from .pruning import ForwardPass
from .vision_hooks import VisionHooks


def exchange_features(
    session: Session,
    exchange: FeatureExchange,
    forward: ForwardPass,
    arguments: dict[str, Any],
    tower: VisionHooks,
) -> dict[str, Any]:
    """Arguments of the decoder with features of earlier turns, if the pass has such; else its own are taken.

    Parameters
    ----------
    session : Session
    exchange : FeatureExchange
        Of the call.
    forward : ForwardPass
    arguments : dict
        Of the decoder.
    tower : VisionHooks

    Raises
    ------
    FeaturesTakenError
        Where the pass was to do no more.
    """
    ids, request = forward.ids, forward.request
    if forward.kept is not None:
        assert ids is not None  # since features were handed over
        return put_in(session.adapter, forward.kept, ids, arguments)
    if ids is not None and forward.visual_masks and (request is None or request.first is None):
        masks, traits, vision = forward.visual_masks, session.options.traits, list[VisionRows]()
        if traits.needs & VISION_NEEDS:
            visual = torch.stack(list(masks.values())).any(dim=0)
            vision = tower.rows(masks, [row.nonzero()[:, 0] for row in visual], traits)
        of_rows = forward.layouts if request is None else [sample.layouts for sample in request.samples]
        copies = 1 if exchange.only_takes else session.copies
        exchange.taken = take(session.adapter, masks, ids, arguments, vision, of_rows, session.given, copies)
    if exchange.only_takes:
        raise FeaturesTakenError
    return arguments


def kept_readings(kept: KeptFeatures, request: Request) -> list[VisionRows]:
    """What earlier turns have had read of the vision tower, by sample, as far as the selector needs it."""
    needs = request.traits.needs & VISION_NEEDS
    rows = kept.of_rows(len(request.samples))
    return [VisionRows() if row.vision is None else row.vision.only(needs) for row in rows]


def put_in(adapter: ModelAdapter, kept: KeptFeatures, ids: Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the decoder with features in their places.

    Parameters
    ----------
    adapter : ModelAdapter
    kept : KeptFeatures
    ids : Tensor of shape (batch, q_len), int64
    arguments : dict
        Of the decoder, with plain embeddings.
    """
    embeds = arguments["inputs_embeds"].clone()
    rows = kept.of_rows(ids.shape[0])
    embeds[kept.places(ids).to(embeds.device)] = torch.cat([row.tokens for row in rows]).to(embeds)
    changed = {**arguments, "inputs_embeds": embeds}
    late = adapter.decoder.late_features
    if late is not None and any(row.late for row in rows):
        by_row = [row.late for row in rows if row.late]
        mask = torch.stack(list(kept.masks(adapter, ids).values())).any(dim=0)
        features = [torch.cat(of_layer) for of_layer in zip(*by_row, strict=True)]
        changed |= {late.mask: mask.to(embeds.device), late.features: features}
    return changed


def take(
    adapter: ModelAdapter,
    masks: Mapping[str, Tensor],
    ids: Tensor,
    arguments: Mapping[str, Any],
    vision: Sequence[VisionRows],
    layouts: Sequence[Sequence[Layout]],
    given: Mapping[str, Any],
    copies: int,
) -> KeptFeatures:
    """What the images of a prompt have become.

    Parameters
    ----------
    adapter : ModelAdapter
    masks : mapping
        Placeholders by kind, (batch, q_len).
    ids : Tensor of shape (batch, q_len), int64
    arguments : mapping
        Of the decoder.
    vision : sequence of VisionRows
        By row; empty: nothing was read.
    layouts : sequence of sequence of Layout
        By row; empty where they are not known.
    given : mapping
        Arguments of the call.
    copies : int
        Rows per prompt.
    """
    embeds, visual = arguments["inputs_embeds"].detach(), torch.stack(list(masks.values())).any(dim=0)
    plain = adapter.decoder.embed(ids.masked_fill(visual, 0))
    others = ids[~visual & (plain != embeds).any(dim=-1).to(ids.device)]  # such as what stands around images
    kinds = tuple(masks)
    kept = KeptFeatures((), kinds, frozenset(others.tolist()) | {adapter.modalities[kind].token_id for kind in kinds})
    prompts = slice(None, None, copies)
    places = kept.places(ids)[prompts].to(embeds.device)
    late: list[tuple[Tensor, ...]] = []
    if adapter.decoder.late_features is not None:
        sizes = visual.sum(dim=1).tolist()
        of_layers = arguments.get(adapter.decoder.late_features.features) or ()
        late = [rows.detach().split(sizes)[prompts] for rows in of_layers]
    rows = rows_of(
        adapter,
        ids[prompts],
        kinds,
        [own[at] for own, at in zip(embeds[prompts], places, strict=True)],
        [[rows.clone() for rows in layer] for layer in late],
        vision[prompts],
        layouts[prompts],
        given,
    )
    return KeptFeatures(rows, kinds, kept.token_ids)
