"""Worker processes on one device, as a small model leaves most of it idle."""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...error_notes import with_notes
from ..settings import EvalConfig, Setting
from ..suites.registry import open_suite
from .sharding import Shard, run_shard

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


def run_workers(
    config: EvalConfig,
    folder: Path,
    count: int,
    settings: Sequence[Setting],
    on_rows: Callable[[int], None],
) -> None:
    """Runs the shards of a run in ``count`` processes, each with a model of its own.

    Every worker stops when one fails, when this process is interrupted, and when it dies.

    Parameters
    ----------
    config : EvalConfig
    folder : Path
        Of the predictions.
    count : int
    settings : sequence of Setting
    on_rows : callable
        As in :func:`~sparsevlm.evaluation.execution.sharding.run_shard`.

    Raises
    ------
    Exception
        What the first failing worker raised.
    ChildProcessError
        If a worker was killed.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(config, folder, Shard(index, count), settings, messages), daemon=True)
        for index in range(count)
    ]
    try:
        for worker in workers:
            worker.start()
        _follow(workers, messages, on_rows)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        for worker in workers:
            if worker.pid is not None:
                worker.join()


def threads_of_each(count: int) -> int:
    """Threads that torch computes with in each of ``count`` workers."""
    return max(1, (os.cpu_count() or 1) // count)


def _follow(workers: list[Any], messages: Any, on_rows: Callable[[int], None]) -> None:
    """Passes on the workers' messages until the last worker is done."""
    running = set(range(len(workers)))
    while running:
        try:
            index, kind, content = messages.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            for index in sorted(running):
                if workers[index].exitcode is not None and messages.empty():
                    raise ChildProcessError(
                        f"worker {index} ended with exit code {workers[index].exitcode} (a negative one is the signal "
                        "that killed it, often for want of memory: try fewer --workers). The same command goes on."
                    ) from None
            continue
        if kind == "rows":
            on_rows(content)
        elif kind == "done":
            running.discard(index)
        elif kind == "failed":
            error, trace = content
            logger.info("worker %d failed:\n%s", index, trace)
            raise error


def _work(config: EvalConfig, folder: Path, shard: Shard, settings: Sequence[Setting], messages: Any) -> None:
    """Runs a shard in a worker process."""
    import torch
    from transformers.utils import logging as transformers_logging

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C as well, and ends the workers
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads_of_each(shard.count))
    parent = multiprocessing.parent_process()

    def tell(kind: str, content: Any) -> None:
        if parent is not None and not parent.is_alive():
            raise SystemExit(1)
        messages.put((shard.index, kind, content))

    try:
        run_shard(config, open_suite(config), folder, shard, settings, partial(tell, "rows"))
    except Exception as error:
        tell("failed", (_sendable(error), traceback.format_exc()))
    else:
        tell("done", None)


def _sendable(error: Exception) -> Exception:
    """The error itself, or its message as a RuntimeError if it cannot be pickled safely."""
    is_plain = type(error).__module__ == "builtins" and all(isinstance(argument, (str, int)) for argument in error.args)
    return error if is_plain else RuntimeError(f"{type(error).__name__}: {with_notes(error)}")
