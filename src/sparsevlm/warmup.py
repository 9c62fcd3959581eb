"""Requests run ahead, so that the first one of a user finds all that it needs."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Calls of a like size until all that it needs is compiled and recorded.
CALLS = 3
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmupReport:
    """Outcome of a warm-up.

    Attributes
    ----------
    n_run, n_left : int
        Requests that were run, and those for which there was no time or memory.
    seconds : float
    n_bytes : int
        Memory of the GPU that it took for good; 0 elsewhere.
    """

    n_run: int
    n_left: int
    seconds: float
    n_bytes: int


def warmup(
    model: Any, requests: Sequence[Mapping[str, Any]], max_new_tokens: int, seconds: float, largest: float
) -> WarmupReport:
    """Run requests, largest first, until the time is over.

    Parameters
    ----------
    model : nn.Module
    requests : sequence of mapping
        Arguments of ``generate`` each, as the processor makes them.
    max_new_tokens : int
        That later requests will ask for: what is recorded has room for so many.
    seconds : float
        No request begins after that.
    largest : float
        Share of the GPU's memory that may be taken in all before no further request begins.

    Returns
    -------
    WarmupReport
    """
    cuda = model.device.type == "cuda"
    begin, before, n_run = time.monotonic(), _taken(model.device), 0
    for request in sorted(requests, key=_size, reverse=True):
        if n_run and time.monotonic() - begin > seconds:
            break
        if cuda and _taken(model.device) > largest * torch.cuda.get_device_properties(model.device).total_memory:
            break
        with torch.no_grad():
            for _ in range(CALLS):  # a second token: the step after the first is recorded as well
                options = {"max_new_tokens": max_new_tokens, "stopping_criteria": [_after_two()]}
                model.generate(**request, do_sample=False, **options)
        n_run += 1
    if cuda:
        torch.cuda.synchronize(model.device)
    found = WarmupReport(n_run, len(requests) - n_run, time.monotonic() - begin, max(0, _taken(model.device) - before))
    logger.info("warm-up: %d requests in %.1f s, %.0f MB", found.n_run, found.seconds, found.n_bytes / 1e6)
    return found


def _after_two() -> Any:
    calls = []

    def criterion(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return torch.full((input_ids.shape[0],), len(calls) >= 2, device=input_ids.device)

    return criterion


def _size(request: Mapping[str, Any]) -> int:
    return sum(value.numel() for value in request.values() if isinstance(value, Tensor))


def _taken(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
