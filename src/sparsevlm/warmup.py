"""Requests run ahead, so that the first one of a user finds all that it needs."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engine.capacities import MOST_TILES, STEPPED, capacities, row_capacity, tile_capacity
from .models import Grid, ModelAdapter

# Tokens of a request that are not visual.
_TEXTS = (24, 62, 110, 150, 190)
_TINY = 16  # visual tokens of an image of which nothing is dropped
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


@dataclass(frozen=True)
class Rung:
    """A request that is run ahead.

    Attributes
    ----------
    size : int
        Larger ones come first.
    make : callable
        Gives the arguments of ``generate``.
    """

    size: int
    make: Callable[[], Mapping[str, Any]]


def given(requests: Sequence[Mapping[str, Any]]) -> list[Rung]:
    """Requests of the user's."""

    def size(request: Mapping[str, Any]) -> int:
        return sum(value.numel() for value in request.values() if isinstance(value, Tensor))

    return [Rung(size(request), functools.partial(dict, request)) for request in requests]


def ladder(adapter: ModelAdapter, most_visual: int, reads_text: bool, is_free: bool = False) -> list[Rung]:
    """Requests of one image that need, together, all capacities up to a number of visual tokens.

    Texts are short, middling and long, and of the rows of a large capacity all are filled, or as few as it takes, so
    that what depends on more than the sum of rows is there as well. Small capacities differ more in what the rank may
    keep of them: they get more texts, where these are read. Where the selector chooses freely how many tokens go on,
    nobody knows what it will take of an image: long texts fill the capacities beside one of which nothing is dropped.
    """
    per_token = adapter.vision.patches_per_token
    sizes = _sizes(most_visual, reads_text)
    if is_free:
        sizes |= {(_TINY, rows - 1 - _TINY) for rows in capacities(most_visual + _TEXTS[-1])}
    covered = {row_capacity(per_token * _grid(n)[1] * _grid(n)[2]) for n, _ in sizes}
    for patches in capacities(per_token * most_visual):
        if patches not in covered and adapter.vision.program is not None:
            sizes.add((max(1, patches // per_token), _TEXTS[0]))
    least = adapter.family.blank_image(adapter, (1, 1, 1))
    in_tiles = any(part.in_tiles for part in adapter.vision.captured)
    if in_tiles and least is not None:
        most = min(MOST_TILES, most_visual // least.n_visual)
        sizes |= {(min(most, tile_capacity(n)) * least.n_visual, _TEXTS[0]) for n in range(1, most + 1)}

    def rung(n_visual: int, n_text: int) -> Rung:
        # Tiles that are recorded come in any number, whatever the shape of the image.
        grid = (1, 1, n_visual) if in_tiles else _grid(n_visual)
        return Rung(n_visual, lambda: adapter.family.example(adapter, grid, n_text))

    # Some images come in a few sizes only; of a family without examples, each request says so.
    return [rung(*size) for size in sorted({(adapter.family.example_size(adapter, n), text) for n, text in sizes})]


def _sizes(most_visual: int, reads_text: bool) -> set[tuple[int, int]]:
    """Visual tokens and text of the requests."""
    sizes: set[tuple[int, int]] = set()
    before, few_texts = 0, (_TEXTS[0], _TEXTS[-1])
    for rows in capacities(most_visual + _TEXTS[-1]):
        is_small = rows <= STEPPED
        for n_text in _TEXTS if is_small and reads_text else few_texts:
            numbers = [min(most_visual, rows - 1 - n_text)]
            if not is_small and n_text == _TEXTS[0]:
                numbers.append(_of_a_grid(before - n_text))
            for n_visual in numbers:
                if 0 < n_visual <= most_visual and row_capacity(n_visual + n_text + 1) == rows:
                    sizes.add((n_visual, n_text))
        before = rows
        if _TINY < rows <= row_capacity(_TINY + _TEXTS[-1]):  # of which nothing is dropped
            sizes.add((_TINY, rows - 1 - _TINY))
    return sizes


def _grid(n_visual: int) -> Grid:
    """A nearly square image of so many visual tokens, or a few less."""
    height = math.isqrt(n_visual)
    return 1, height, n_visual // height


def _of_a_grid(least: int) -> int:
    """Visual tokens of a nearly square image of at least so many."""
    height = math.isqrt(least)
    return -(-least // height) * height


def warmup(model: Any, rungs: Sequence[Rung], max_new_tokens: int, seconds: float, largest: float) -> WarmupReport:
    """Run requests, largest first, until the time is over.

    Parameters
    ----------
    model : nn.Module
    rungs : sequence of Rung
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
    for rung in sorted(rungs, key=lambda rung: rung.size, reverse=True):
        if n_run and time.monotonic() - begin > seconds:
            break
        if cuda and _taken(model.device) > largest * torch.cuda.get_device_properties(model.device).total_memory:
            break
        with torch.no_grad():  # a second token: the step after the first is recorded as well
            options = {"max_new_tokens": max_new_tokens, "stopping_criteria": [_after_two()]}
            model.generate(**rung.make(), do_sample=False, **options)
        n_run += 1
    if cuda:
        torch.cuda.synchronize(model.device)
    found = WarmupReport(n_run, len(rungs) - n_run, time.monotonic() - begin, max(0, _taken(model.device) - before))
    logger.info("warm-up: %d requests in %.1f s, %.0f MB", found.n_run, found.seconds, found.n_bytes / 1e6)
    return found


def _after_two() -> Any:
    calls = []

    def criterion(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return torch.full((input_ids.shape[0],), len(calls) >= 2, device=input_ids.device)

    return criterion


def _taken(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
