"""Greedy and sampled decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sample(
    input_ids: Tensor,
    logits: Tensor,
    step: Callable[[Tensor], Tensor],
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    check: Callable[[], None] = lambda: None,
) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Greedy and sampled decoding, token for token as transformers' ``_sample``.

    Parameters
    ----------
    input_ids : Tensor of shape (batch, length), int64
        Prompts.
    logits : Tensor of shape (batch, vocab_size)
        Of the first new token.
    step : callable
        ``step(tokens)`` with tokens of shape (batch,) gives the logits of the next.
    logits_processor, stopping_criteria, generation_config
        As transformers has prepared them.
    streamer : BaseStreamer, optional
    check : callable
        Raises where the prompt has failed; called when the first token is there.

    Returns
    -------
    sequences : Tensor of shape (batch, length + n_new), int64
    scores, logits : tuple of Tensor of shape (batch, vocab_size), float32, or None
        By new token, as processed and as they came, where ``generation_config`` asks for them.
    """
    pad, wants_dict = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    all_scores: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_scores else None
    all_logits: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_logits else None
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    first = input_ids.shape[1] + 1
    while True:
        logits = logits.to(copy=True, dtype=torch.float32, device=input_ids.device)
        scores = logits_processor(input_ids, logits)
        all_scores = None if all_scores is None else (*all_scores, scores)
        all_logits = None if all_logits is None else (*all_logits, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if pads:
            tokens = tokens * unfinished + pad.to(input_ids.device) * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, all_scores)
        if streamer is not None:
            if input_ids.shape[1] == first:
                check()
            streamer.put(tokens.cpu())
        goes_on = bool(unfinished.max())
        if input_ids.shape[1] == first:
            check()
        if not goes_on:
            break
        logits = step(tokens)
    if streamer is not None:
        streamer.end()
    return input_ids, all_scores, all_logits
