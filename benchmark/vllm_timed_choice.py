"""Times the plugin's choice of tokens inside an engine of vLLM, with the device waited for before and behind it.

:func:`register` is an entry point of ``vllm.general_plugins`` that :mod:`benchmark.vllm_server` gives its servers:
while the folder that ``SPARSEVLM_CHOICE_TIMES`` names holds the file :data:`SWITCH`, each call adds a line to
:data:`TIMES`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = "SPARSEVLM_CHOICE_TIMES"
SWITCH, TIMES = "switch", "times.jsonl"


def timed(choose: Callable[..., Any], keep_time: Callable[[float, int], None]) -> Callable[..., Any]:
    """The same choice, each call of which is timed.

    Parameters
    ----------
    choose : callable
        :func:`sparsevlm.plugins.vllm.choice.choose`.
    keep_time : callable
        Takes milliseconds, and of how many images.
    """

    def timed_choose(runs: Sequence[Any], *options: Any) -> Any:
        _synchronize()
        begin = time.perf_counter()
        chosen = choose(runs, *options)
        _synchronize()
        keep_time(1e3 * (time.perf_counter() - begin), len(runs))
        return chosen

    return timed_choose


def register() -> None:
    """Wrap the choice, before the plugin's model takes it from its module."""
    from sparsevlm.plugins.vllm import choice

    if hasattr(choice.choose, "is_timed"):
        return
    folder = Path(os.environ[FOLDER])

    def keep_time(milliseconds: float, n_images: int) -> None:
        with (folder / TIMES).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([milliseconds, n_images]) + "\n")

    choose, with_times = choice.choose, timed(choice.choose, keep_time)

    def choose_or_time(runs: Sequence[Any], *options: Any) -> Any:
        prunes = any(run.n_keep < run.rows.shape[0] for run in runs)
        return (with_times if prunes and (folder / SWITCH).exists() else choose)(runs, *options)

    choose_or_time.is_timed = True  # type: ignore[attr-defined]
    choice.choose = choose_or_time


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
