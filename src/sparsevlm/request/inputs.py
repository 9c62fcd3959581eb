"""Inputs of the model: what cannot be pruned, where the visual tokens are, which text may vote."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import cache_of
from ..models import Layout, Modality, ModelAdapter, n_tokens

_ENCODED = "mm_encoder_outputs"  # images and videos as what the vision tower made of them
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def visual_masks(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Finds the tokens that stand for image or video features, by kind.

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
    input_ids = inputs.get("input_ids")
    masks = {}
    for kind in images_of(adapter, inputs):
        token_id = adapter.modalities[kind].token_id
        if input_ids is not None:
            found = input_ids == token_id
        else:
            embedding: Any = adapter.model.get_input_embeddings()
            embeds, at = inputs["inputs_embeds"], embedding.weight.device
            # Offloaded weights are on no device until they are needed.
            placeholder = embedding(torch.tensor(token_id, device=embeds.device if at.type == "meta" else at))
            found = (embeds == placeholder.to(embeds.device)).all(dim=-1)
        if not bool(found.any()):
            raise ValueError(
                f"the inputs bring {kind} features but no {kind} token (id {token_id}) to put them in. "
                + _where_tokens_are(cache_of(inputs), adapter.modalities[kind])
            )
        masks[kind] = found
    return masks


def _where_tokens_are(cache: Any, modality: Modality) -> str:
    if cache is None or not int(cache.get_seq_length()):
        return (
            "Build the prompt by the processor, e.g. processor.apply_chat_template, so that it holds the placeholders."
        )
    return "The new tokens hold none. " + remedy_of_later_images(modality, 0)


def remedy_of_later_images(modality: Modality, n_placeholders: int) -> str:
    """What to give on a kept cache instead of images that it holds, where the new tokens hold some placeholders."""
    given = " and ".join((modality.pixels, *modality.size_inputs))
    instead = f"give {given} of new images alone" if n_placeholders else f"leave out {given}"
    return f"What the cache holds is not encoded again: {instead}."


def images_of(adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[str]:
    """Kinds of images or videos that a call brings, encoded ones among them."""
    encoded = arguments.get(_ENCODED) or {}
    return [
        kind
        for kind, modality in adapter.modalities.items()
        if arguments.get(modality.pixels) is not None or encoded.get(kind) is not None
    ]


def brings_images(adapter: ModelAdapter, arguments: Mapping[str, Any]) -> bool:
    """Tells whether a call brings images or videos, encoded ones among them."""
    return bool(images_of(adapter, arguments))


def image_arguments(adapter: ModelAdapter) -> set[str]:
    """Names of all arguments by which images and videos come."""
    names = {_ENCODED}
    for kind, modality in adapter.modalities.items():
        names |= {modality.pixels, *modality.size_inputs, *modality.encoder_inputs}
        if (encode := getattr(adapter.base_model, f"get_{kind}_features", None)) is not None:
            names |= parameters_of(encode)
    return names


def parameters_of(function: Any) -> set[str]:
    """Names of the arguments of a method of a model, but for those of all methods."""
    return set(inspect.signature(function).parameters) - {"self", "kwargs", "return_dict"}


def visual_grids(
    adapter: ModelAdapter, layouts: Mapping[str, Sequence[Layout] | None], input_ids: Tensor | None
) -> list[list[Layout]]:
    """Layout of each image or video, per sample in prompt order; empty where it cannot be told.

    Layouts may be those of a batch before it was expanded for beams: then every group of equal rows shares them.

    Parameters
    ----------
    adapter : ModelAdapter
    layouts : mapping
        Of all images of the batch in order, by kind.
    input_ids : Tensor of shape (batch, q_len), int64, optional
    """
    if input_ids is None:
        return []
    by_token: dict[int, list[Layout]] = {modality.token_id: [] for modality in adapter.modalities.values()}
    for kind, found in layouts.items():
        by_token[adapter.modalities[kind].token_id] += found or ()
    in_parts = {modality.token_id for modality in adapter.modalities.values() if modality.in_parts}
    rows = input_ids.tolist()
    for copies in (n for n in range(1, len(rows) + 1) if len(rows) % n == 0):
        of_rows = _layouts_of_rows(rows[::copies], by_token, in_parts)
        if of_rows is not None:
            return [row for row in of_rows for _ in range(copies)]
    return []


def _layouts_of_rows(
    rows: list[list[int]], layouts: dict[int, list[Layout]], in_parts: Collection[int]
) -> list[list[Layout]] | None:
    """Hand out the layouts in order of the placeholders, or ``None`` if the numbers do not fit."""
    queues = {token_id: list(found) for token_id, found in layouts.items()}
    per_row: list[list[Layout]] = []
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
            layout = queues[token_id].pop(0)
            end = end_of_input(row, position, n_tokens(layout), token_id in in_parts)
            if end is None:
                return None
            per_row[-1].append(layout)
            position = end
    return None if any(queues.values()) else per_row


def end_of_input(row: list[int], start: int, size: int, in_parts: bool) -> int | None:
    """Where the placeholders of an image or video end that begin at ``start``; ``None`` if there are fewer."""
    token_id = row[start]
    if not in_parts:
        return start + size if row[start : start + size] == [token_id] * size else None
    own = [position for position in range(start, len(row)) if row[position] == token_id][:size]
    return own[-1] + 1 if len(own) == size else None


def check_inputs(adapter: ModelAdapter, inputs: Mapping[str, Any], *, of_generate: bool) -> None:
    """Refuse arguments of a type or shape that the model would fail on somewhere inside.

    Parameters
    ----------
    adapter : ModelAdapter
    inputs : mapping
        Arguments of ``generate``, or of the model.
    of_generate : bool
        Which of the two: a direct call may bring masks of queries and keys.

    Raises
    ------
    TypeError, ValueError
        With what was got and what is wanted.
    NotImplementedError
        If speech is to be made of a prompt with images.
    """
    name = "inputs" if of_generate and inputs.get("inputs") is not None else "input_ids"
    ids, embeds, mask = inputs.get(name), inputs.get("inputs_embeds"), inputs.get("attention_mask")
    if ids is None and embeds is None and not of_generate:
        raise ValueError("neither input_ids nor inputs_embeds were given. Pass one of them.")
    _check_tensor(name, ids, "(batch, length)", (2,), "integers")
    _check_tensor("inputs_embeds", embeds, "(batch, length, hidden_size)", (3,), "floats")
    _check_tensor("mm_token_type_ids", inputs.get("mm_token_type_ids"), "(batch, length)", (2,), "integers")
    _check_tensor("position_ids", inputs.get("position_ids"), "(axes, batch, length) or (batch, length)", (2, 3))
    if of_generate or not isinstance(mask, Mapping):
        _check_tensor("attention_mask", mask, "(batch, length)", (2,) if of_generate else (2, 4))
    cache = cache_of(inputs)
    if cache is not None and not callable(getattr(cache, "get_seq_length", None)):
        raise TypeError(
            f"the cache is a {type(cache).__name__}; wanted is a transformers Cache, such as DynamicCache(), or None "
            "for a new one."
        )
    brings_pixels = False
    for modality in adapter.modalities.values():
        pixels = inputs.get(modality.pixels)
        _check_tensor(modality.pixels, pixels, "as the processor makes it", range(2, 9))
        for size in modality.size_inputs:
            if pixels is not None and inputs.get(size) is None:
                raise ValueError(f"{modality.pixels} was given without {size}. Pass all that the processor returned.")
            _check_tensor(size, inputs.get(size), "(number of images or videos, 3)", (2,), "integers", n_columns=3)
        brings_pixels |= pixels is not None
    if brings_pixels and of_generate and adapter.family.speaks and inputs.get("output_hidden_states"):
        raise NotImplementedError(
            "output_hidden_states, as speech is made of them, would lack the states of dropped tokens. Ask the model "
            "that speaks for text alone, with return_audio=False or generation_mode='text', or call remove_sparsevlm "
            "on its thinker first."
        )
    tokens = ids if ids is not None else embeds
    if brings_pixels and tokens is not None:
        of_tokens = {"attention_mask": mask, "mm_token_type_ids": inputs.get("mm_token_type_ids")}
        for name_of_tokens, value in of_tokens.items():
            _check_fits(name_of_tokens, value, tokens, has_cache=cache is not None)


def _check_tensor(
    name: str, value: Any, shape: str, n_dims: Collection[int], kind: str = "", *, n_columns: int | None = None
) -> None:
    if value is None:
        return
    wanted = f"wanted is a tensor{f' of {kind}' if kind else ''}, {shape}. Take what the processor makes"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; {wanted} with return_tensors='pt'.")
    if value.ndim not in n_dims or (n_columns is not None and value.shape[-1] != n_columns):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; {wanted}.")
    if (kind == "integers" and value.dtype not in _INTEGERS) or (kind == "floats" and not value.is_floating_point()):
        raise TypeError(f"{name} has dtype {value.dtype}; {wanted}.")


def _check_fits(name: str, value: Any, tokens: Tensor, *, has_cache: bool) -> None:
    """Refuse what is not about as many tokens as there are; with a cache it may tell of those in it, too."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        return
    (batch, length), (n_rows, n_columns) = tokens.shape[:2], value.shape
    if n_rows != batch or (n_columns != length and not has_cache):
        raise ValueError(
            f"{name} has shape {(n_rows, n_columns)}; wanted is {(batch, length)}, one entry per token. Take what the "
            "processor makes, or leave it out."
        )


def check_copies(adapter: ModelAdapter, inputs: Mapping[str, Any], copies: int) -> None:
    """Refuse copies of prompts with several images each, where transformers gives them to the wrong prompts.

    Older versions repeat every image by itself ([A, A, B, B] for a prompt with A and B), unless the model's class
    knows which belong together, or all images of the batch together. Newer ones encode before they repeat.

    Parameters
    ----------
    adapter : ModelAdapter
    inputs : mapping
        Keyword arguments of the base model.
    copies : int
        Rows per prompt: beams or returned sequences.

    Raises
    ------
    NotImplementedError
    """
    ids, packs = inputs.get("input_ids"), adapter.family.packs_pixels
    knows = "_expand_inputs_for_generation" in vars(type(adapter.model)) and not packs
    if copies == 1 or ids is None or knows:
        return
    for kind, modality in adapter.modalities.items():
        pixels = inputs.get(modality.pixels)
        if not isinstance(pixels, Tensor):
            continue
        if packs:
            mixed = ids.shape[0] > copies
        else:
            mixed = pixels.shape[0] != ids.shape[0] or not bool((ids == modality.token_id).any(dim=1).all())
        if mixed:
            raise NotImplementedError(
                f"this version of transformers gives the {kind}s of a prompt with several of them (or with several "
                f"tiles), or of several prompts, to the wrong prompts where each is copied {copies} times, with "
                "SparseVLM and without. Install transformers 5.24, or pass num_beams=1 and num_return_sequences=1."
            )


def check_mask(attention_mask: Any) -> None:
    """Refuse a mask that hides a whole sample with images; waits for the device that it is on.

    Raises
    ------
    ValueError
    """
    if isinstance(attention_mask, Tensor) and not bool(attention_mask.any(dim=-1).all()):
        raise ValueError(
            "attention_mask hides all tokens of a sample; wanted is at least one that is seen. Leave such samples out."
        )


def check_call(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
    """Refuse arguments of the model that speak of the whole sequence.

    Raises
    ------
    NotImplementedError
    """
    if inputs.get("labels") is not None:
        raise NotImplementedError(
            "labels= needs a loss over the whole sequence, of which pruning leaves a part. Compute the loss "
            "after remove_sparsevlm(model); to generate, leave them out."
        )
    has_pixels = any(inputs.get(modality.pixels) is not None for modality in adapter.modalities.values())
    if isinstance(inputs.get("logits_to_keep"), Tensor) and has_pixels:
        raise NotImplementedError(
            "logits_to_keep as a tensor names rows of the whole sequence, of which pruning leaves a part. Pass an "
            "int, or take the rows by state.report.logit_positions."
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
