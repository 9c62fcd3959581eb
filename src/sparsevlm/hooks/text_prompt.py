"""Prompts that bring no pixels, in which nothing is pruned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..request.session import Session


def begin_text(session: Session, cache: Any, ids: Tensor, attention_mask: Any) -> None:
    """Begin the request of a prompt of text, or of a later turn on a cache that no request has filled.

    Parameters
    ----------
    session : Session
    cache : Cache or None
    ids : Tensor of shape (batch, q_len) or (batch, q_len, hidden_size)
        Tokens, or embeddings of them.
    attention_mask : Tensor of shape (batch, length), optional
    """
    request = session.new_request(cache, ids.shape[0], ids.shape[1])
    n_valid = [ids.shape[1]] * ids.shape[0]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        n_valid = attention_mask[:, -ids.shape[1] :].sum(dim=-1).tolist()
    if ids.ndim == 2:
        request.skip("no image or video in the input", n_valid)
        return
    request.skip("inputs_embeds without pixels, which do not tell of visual tokens", n_valid)
    session.warn_once(
        "embeddings",
        "inputs_embeds came without pixels: if images are merged into them, nothing is pruned, as they do not tell "
        "where. Pass input_ids and pixels, or inputs_embeds with placeholders and pixels.",
    )
