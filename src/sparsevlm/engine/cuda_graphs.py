"""CUDA graphs: programs of fixed shapes, captured once and replayed."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

logger = logging.getLogger(__name__)


class GraphPool:
    """Records on one device; what it records shares one pool of memory, as no two run at the same time.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: torch.cuda.MemPool | None = None
        # One for all, since memory that is given back is only had again by the stream that had it.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def clear(self) -> None:
        """Give the memory back, as soon as the last program is gone."""
        self._memory = None

    def record(self, run: Callable[[], T], rewind: Callable[[], object] = lambda: None) -> Callable[[], T]:
        """``run`` as a CUDA graph, or itself on another device and where memory for a graph is wanting.

        Parameters
        ----------
        run : callable
            Reads and writes tensors that stay where they are, and waits for nothing.
        rewind : callable
            Undoes what a run moved on: it runs before it is recorded, so that kernels are compiled and memory is there.

        Returns
        -------
        callable
            What it gives is overwritten by its next call, or by that of anything recorded before it, whose memory it
            may have.
        """
        stream = self._stream
        if stream is None:
            return run
        if self._memory is None:
            with torch.cuda.device(self._device):
                self._memory = torch.cuda.MemPool()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream), torch.cuda.use_mem_pool(self._memory, self._device):
            run()
            rewind()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool: Any = self._memory.id
        try:
            with _no_collection(), torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = run()
        except RuntimeError as error:  # out of memory is one
            logger.warning("sparsevlm: a CUDA graph could not be recorded, it runs operation by operation: %s", error)
            torch.cuda.synchronize(self._device)  # where the device itself has failed, this says so
            return run
        rewind()

        def replay() -> T:
            graph.replay()
            return result

        replay.run = run  # type: ignore[attr-defined]  # the tensors that the graph reads live as long as it
        return replay


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a device that nobody waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Nothing of an older graph may be freed while one is recorded."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class LRUCache(Generic[K, T]):
    """A few things by their keys, those used last kept.

    Parameters
    ----------
    most : int
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._things: OrderedDict[K, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._things)

    def get(self, key: K, make: Callable[[], T]) -> T:
        """The thing of a key, made if there is none."""
        if key in self._things:
            self._things.move_to_end(key)
            return self._things[key]
        while len(self._things) >= self._most:
            self._things.popitem(last=False)  # before another takes its memory
        thing = self._things[key] = make()
        return thing

    def clear(self) -> None:
        """Free them all."""
        self._things.clear()
