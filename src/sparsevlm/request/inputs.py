"""Inputs of the model: what cannot be pruned, where the visual tokens are, which text may vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models import Grid, ModelAdapter


def visual_masks(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which tokens of the forward stand for image or video features, per kind that it brings.

    Only a forward that brings pixels (or features computed from them) has visual tokens: a model can generate the
    placeholder ids itself.

    Parameters
    ----------
    adapter : ModelAdapter
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
    brought = [
        kind
        for kind, modality in adapter.modalities.items()
        if inputs.get(modality.pixels) is not None or encoded.get(kind) is not None
    ]
    input_ids = inputs.get("input_ids")
    masks = {}
    for kind in brought:
        token_id = adapter.modalities[kind].token_id
        if input_ids is not None:
            found = input_ids == token_id
        else:
            embedding: Any = adapter.model.get_input_embeddings()
            placeholder = embedding(torch.tensor(token_id, device=embedding.weight.device))
            found = (inputs["inputs_embeds"] == placeholder).all(dim=-1)
        if not bool(found.any()):
            raise ValueError(
                f"the inputs bring {kind} features but no {kind} token (id {token_id}) to put them in. Build the "
                "prompt with the processor, e.g. processor.apply_chat_template, so that it holds the placeholders."
            )
        masks[kind] = found
    return masks


def visual_grids(
    adapter: ModelAdapter, grids: Mapping[str, Sequence[Grid] | None], input_ids: Tensor | None
) -> list[list[Grid]]:
    """Grid (t, h, w) in tokens of each image or video, per sample in prompt order; empty where it cannot be told.

    Grids may be those of a batch before it was expanded for beams: then every group of equal rows shares them.

    Parameters
    ----------
    adapter : ModelAdapter
    grids : mapping
        Of all images of the batch in order, by kind.
    input_ids : Tensor of shape (batch, q_len), int64, optional
    """
    if input_ids is None:
        return []
    by_token = {modality.token_id: list(grids.get(kind) or ()) for kind, modality in adapter.modalities.items()}
    rows = input_ids.tolist()
    for copies in (n for n in range(1, len(rows) + 1) if len(rows) % n == 0):
        found = _grids_of_rows(rows[::copies], by_token)
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


def check_call(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
    """Refuse arguments of the model that speak of the whole sequence.

    Raises
    ------
    NotImplementedError
    """
    if inputs.get("labels") is not None:
        raise NotImplementedError(
            "labels= needs a loss over the whole sequence, of which pruning leaves a part. Compute the loss "
            "after remove_sparsevlm(model)."
        )
    has_pixels = any(inputs.get(modality.pixels) is not None for modality in adapter.modalities.values())
    if isinstance(inputs.get("logits_to_keep"), Tensor) and has_pixels:
        raise NotImplementedError(
            "logits_to_keep as a tensor names rows of the whole sequence, of which pruning leaves a part. Pass an "
            "int, or take the rows by state.report.logit_positions."
        )


def check_prefill(generation_config: Any) -> None:
    """Refuse a prompt that comes in parts.

    Raises
    ------
    NotImplementedError
    """
    if generation_config.prefill_chunk_size is not None:
        raise NotImplementedError(
            "prefill_chunk_size splits a prompt into parts that cannot be judged one by one. Unset it, or remove "
            "SparseVLM for this request with remove_sparsevlm(model)."
        )


def check_mode(adapter: ModelAdapter) -> None:
    """Refuse gradient checkpointing, and attentions whose masks cannot be gathered.

    Raises
    ------
    NotImplementedError
    """
    if adapter.decoder.module.training and getattr(adapter.decoder.module, "gradient_checkpointing", False):
        raise NotImplementedError(
            "gradient checkpointing runs layers a second time, outside of the pass that chose the tokens. Call "
            "model.gradient_checkpointing_disable(), or train after remove_sparsevlm(model)."
        )
    name = adapter.decoder.module.config._attn_implementation or "eager"
    if "flex" in name or name.startswith("paged"):
        raise NotImplementedError(
            f"attention {name!r} is not supported under SparseVLM. Call "
            "model.set_attn_implementation('sdpa') (or 'eager', 'flash_attention_2')."
        )


def check_packing(positions: Tensor, attention_mask: Any) -> None:
    """Refuse several sequences packed into one row: pruning would tear them apart.

    Raises
    ------
    NotImplementedError
    """
    text = positions[0]
    if positions.shape[0] != 4 or text.shape[0] != 1 or attention_mask is not None:
        return
    if bool((text.diff(dim=-1) != 1).any()):
        raise NotImplementedError(
            "packed sequences (position_ids that start again within a row) are not supported under SparseVLM; "
            "pass them as a batch with an attention_mask."
        )
