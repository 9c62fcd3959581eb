"""Greedy and sampled decoding."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..selection.similarity import NOT_FINITE


class Steps(Protocol):
    """What runs new tokens.

    Attributes
    ----------
    runs_ahead : bool
        Whether a step may be begun before it is known to be wanted, so that the device does not wait for the host.
    """

    @property
    def runs_ahead(self) -> bool: ...

    def step(self, tokens: Tensor) -> Tensor:
        """Run a token of every sample, (batch,); gives the logits of the next, (batch, vocab_size)."""

    def confirm(self) -> None:
        """Count the last step."""

    def take_back(self) -> None:
        """Undo the last step, which is not wanted after all."""


def sample(
    input_ids: Tensor,
    logits: Tensor,
    steps: Steps,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    is_faulty: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Greedy and sampled decoding, token for token as transformers' ``_sample``.

    Parameters
    ----------
    input_ids : Tensor of shape (batch, length), int64
        Prompts.
    logits : Tensor of shape (batch, vocab_size)
        Of the first new token.
    steps : Steps
    logits_processor, stopping_criteria, generation_config
        As transformers has prepared them.
    streamer : BaseStreamer, optional
    is_faulty : Tensor of shape (1,), bool, optional
        Whether what the prompt's choices were made by holds NaN or infinity; read with the first token.

    Returns
    -------
    sequences : Tensor of shape (batch, length + n_new), int64
    scores, logits : tuple of Tensor of shape (batch, vocab_size), float32, or None
        By new token, as processed and as they came, where ``generation_config`` asks for them.

    Raises
    ------
    ValueError
        If the prompt was faulty.
    """
    pad, wants_dict = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    all_scores: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_scores else None
    all_logits: tuple[Tensor, ...] | None = () if wants_dict and generation_config.output_logits else None
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    is_faulty = unfinished.new_zeros(1) if is_faulty is None else is_faulty.to(input_ids.device, torch.int64)
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
        news = _OnItsWay(torch.cat([tokens, unfinished.max()[None], is_faulty]))
        is_ahead = steps.runs_ahead and input_ids.shape[1] < generation_config.max_length
        if is_ahead:
            logits = steps.step(tokens)
        said, goes_on, failed = news.read().split([tokens.shape[0], 1, 1])
        if failed:
            raise ValueError(NOT_FINITE)
        if streamer is not None:
            streamer.put(said)
        if not goes_on:
            if is_ahead:
                steps.take_back()
            break
        if not is_ahead:
            logits = steps.step(tokens)
        steps.confirm()
    if streamer is not None:
        streamer.end()
    return input_ids, all_scores, all_logits


class _OnItsWay:
    """A tensor of the device that is copied to the host while other work goes on."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy, self._ready = tensor, None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> Tensor:
        """What it is, once it is there."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._copy
