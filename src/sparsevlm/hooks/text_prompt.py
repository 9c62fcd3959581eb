"""Prompts that bring no pixels, in which nothing is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..request.placeholders import reason_of_text
from ..request.session import Session

_ENCODED = "image_hidden_states"  # features by another name, which some models take


def begin_text(session: Session, cache: Any, ids: Tensor, inputs: Mapping[str, Any]) -> None:
    """Begin the request of a prompt of text, or of a turn of text on a kept cache.

    Parameters
    ----------
    session : Session
    cache : Cache or None
    ids : Tensor of shape (batch, q_len) or (batch, q_len, hidden_size)
        Tokens, or embeddings of them.
    inputs : mapping
        Keyword arguments of the base model.
    """
    attention_mask = inputs.get("attention_mask")
    request = session.new_request(cache, ids.shape[0], ids.shape[1])
    n_valid = [ids.shape[1]] * ids.shape[0]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        n_valid = attention_mask[:, -ids.shape[1] :].sum(dim=-1).tolist()
    if inputs.get(_ENCODED) is not None:
        request.skip("image_hidden_states without pixels, which are not followed", n_valid)
        return
    if ids.ndim == 2:
        if session.in_generate and cache is None:
            request.comes_again(ids)
        request.skip(reason_of_text(session, *_given(session, request.past_len, ids, attention_mask)), n_valid)
        return
    request.skip("inputs_embeds without pixels, which do not tell of visual tokens", n_valid)
    session.warn_once(
        "embeddings",
        "inputs_embeds came without pixels: if images are merged into them, nothing is pruned, as they do not tell "
        "where. Pass input_ids and pixels, or inputs_embeds with placeholders and pixels.",
    )


def _given(session: Session, past_len: int, ids: Tensor, mask: Any) -> tuple[Tensor, Any]:
    """What a call was given of the tokens of its first pass, without what it has guessed, and their mask."""
    n_new = session.n_given - past_len
    if not session.is_drafting or not 0 < n_new < ids.shape[1]:
        return ids, mask
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask[:, : mask.shape[1] - (ids.shape[1] - n_new)]
    return ids[:, :n_new], mask
