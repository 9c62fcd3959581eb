"""Fixed lists of operations, recorded once on a CUDA device and replayed; run as they are elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

_WARM_UP_RUNS = 2


def recorded(
    run: Callable[[], T], device: torch.device, rewind: Callable[[], object] = lambda: None
) -> Callable[[], T]:
    """``run`` as a CUDA graph, or itself on another device.

    Parameters
    ----------
    run : callable
        Reads and writes tensors that stay where they are, and waits for nothing.
    device : torch.device
    rewind : callable
        Undoes what a run moved on: it runs before it is recorded, so that kernels are compiled and memory is there.

    Returns
    -------
    callable
        What it gives is overwritten by its next call.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_RUNS):
            run()
            rewind()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    rewind()

    def replay() -> T:
        graph.replay()
        return result

    return replay


class Recent(Generic[K, T]):
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
        thing = self._things.pop(key) if key in self._things else make()
        self._things[key] = thing
        while len(self._things) > self._most:
            self._things.popitem(last=False)
        return thing

    def clear(self) -> None:
        """Free them all."""
        self._things.clear()
