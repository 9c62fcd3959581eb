"""Arguments of later calls on a kept cache: of the whole conversation, and of what is new in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models import ModelAdapter
from .conversation import OF_TOKENS, Conversation
from .inputs import image_arguments, parameters_of
from .kept_features import KeptFeatures, size_names

# Arguments of the base model that are not of its tokens or images, or are made anew.
_NOT_OF_TOKENS = {"use_cache", "position_ids", "labels", "logits_to_keep", "cache", "past_key_values"}


def input_ids_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Tokens that a call is given."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs") if ids is None else ids


def gives_all(arguments: Mapping[str, Any], ids: Tensor) -> bool:
    """Tells whether the ``ids`` of a call are those of the whole conversation, not the new ones alone."""
    mask = arguments.get("attention_mask")
    return mask is None or mask.shape[1] == ids.shape[1]


def check_later_inputs(arguments: Mapping[str, Any], past_len: int) -> None:
    """Refuse tokens of a call of ``generate`` that transformers would cut at a wrong place, as of those in the cache.

    It takes all tokens of a conversation, or the new ones with an ``attention_mask`` for all; of ``inputs_embeds`` all.

    Parameters
    ----------
    arguments : mapping
        Of the call.
    past_len : int
        Tokens in its cache, 1 at least.

    Raises
    ------
    ValueError
    """
    ids, embeds = input_ids_of(arguments), arguments.get("inputs_embeds")
    if embeds is not None:
        if embeds.shape[1] <= past_len:
            raise ValueError(
                f"inputs_embeds hold {embeds.shape[1]} tokens, and the cache {past_len}. Pass those of the whole "
                "conversation: of the tokens in the cache, and of the new ones."
            )
    elif ids is not None:
        n, mask = ids.shape[1], arguments.get("attention_mask")
        length = n if mask is None else mask.shape[1]
        if length != past_len + n and (length != n or n <= past_len):
            raise ValueError(
                f"{n} tokens and an attention_mask for {length} were given, and the cache holds {past_len}. Pass the "
                "input_ids of the whole conversation, those in the cache and the new ones; or the new ones alone with "
                f"an attention_mask for all {past_len + n}."
            )


def whole_ids(before: Conversation, arguments: Mapping[str, Any], ids: Tensor, past_len: int) -> Tensor:
    """All tokens of a conversation, where a call may leave out those in the cache.

    Raises
    ------
    ValueError
        If they are not known.
    """
    if gives_all(arguments, ids):
        return ids
    known = 0 if before.ids is None else before.ids.shape[1]
    if known < past_len:
        raise ValueError(
            f"{ids.shape[1]} new tokens were given on a cache of {past_len}, of which {known} are known. For "
            "turns='refresh' pass all tokens of the conversation and a mask for all of them."
        )
    assert before.ids is not None  # since some are known
    return torch.cat([before.ids[:, :past_len].to(ids), ids], dim=1)


def new_inputs(
    adapter: ModelAdapter, before: Conversation, arguments: Mapping[str, Any], ids: Tensor, past_len: int
) -> dict[str, Any]:
    """Inputs of the base model for the tokens behind ``past_len``, out of all ``ids``, and for their images."""
    mask = arguments.get("attention_mask")
    known = (parameters_of(adapter.base_model.forward) | parameters_of(adapter.model.forward)) - _NOT_OF_TOKENS
    given = {name: value for name, value in arguments.items() if name in known and value is not None}
    given |= {
        name: value[:, past_len:] for name, value in _of_tokens(adapter, before, arguments, ids, past_len).items()
    }
    if isinstance(mask, Tensor):
        given["attention_mask"] = mask[:, past_len:]
    return {**given, "input_ids": ids[:, past_len:]}


def whole_inputs(
    adapter: ModelAdapter,
    before: Conversation,
    arguments: Mapping[str, Any],
    ids: Tensor,
    past_len: int,
    features: KeptFeatures,
) -> dict[str, Any]:
    """A call with all tokens, and without what only the vision tower reads."""
    left_out = {"inputs", *image_arguments(adapter), *size_names(adapter)}
    rest = {name: value for name, value in arguments.items() if name not in left_out}
    sizes = {name: value.to(ids.device) for name, value in features.sizes.items()}
    return {**rest, "input_ids": ids, **_of_tokens(adapter, before, arguments, ids, past_len), **sizes}


def _of_tokens(
    adapter: ModelAdapter, before: Conversation, arguments: Mapping[str, Any], ids: Tensor, past_len: int
) -> dict[str, Tensor]:
    """Arguments that say something of every token, for all of them."""
    found: dict[str, Tensor] = {}
    for name in OF_TOKENS:
        given, known = arguments.get(name), before.of_tokens.get(name)
        if given is None and known is None:
            continue
        if given is not None and given.shape[1] == ids.shape[1]:
            found[name] = given
            continue
        known = None if known is None else known[:, :past_len]  # a cache may have been cropped
        made = _token_types(adapter, ids, known)
        if known is not None:
            n = known.shape[1]
            made[:, :n], made[:, n:past_len] = known.to(made), 0
        if given is not None:
            made[:, made.shape[1] - given.shape[1] :] = given
        found[name] = made
    return found


def _token_types(adapter: ModelAdapter, ids: Tensor, known: Tensor | None) -> Tensor:
    """Kinds of tokens as earlier turns have told them, or as processors do: 1 for images, 2 for videos."""
    made = torch.zeros_like(ids)
    for number, modality in enumerate(adapter.modalities.values(), 1):
        places = ids == modality.token_id
        told = None if known is None else known[places[:, : known.shape[1]]]
        made[places] = number if told is None or not told.numel() else int(told[0])
    return made
