"""Modules of a vision tower as they are, one CUDA graph for each shape of their inputs, called in their place."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models import ModelAdapter
from ...models.tower import CapturedModule
from ..capacities import MOST_TILES, power_of_two, tile_capacity
from ..cuda_graphs import GraphPool, LRUCache
from ..support import attention_of, unsupported_capture, unsupported_captured_mode

# Programs that are kept, of tiles and of images by their exact sizes, and sizes that were seen once.
_MOST_GRAPHS, _MOST_SIZED, _MOST_SEEN = 64, 16, 256
# Values of inputs: more keep a GPU busy for longer than it takes to launch what they need.
_MOST_NUMBERS = 1 << 23


@dataclass(frozen=True)
class _Given:
    """Arguments of a module, tensors apart.

    Attributes
    ----------
    tensors : tuple of Tensor
        That programs get copies of.
    key : Hashable
        All else: names, numbers, and integers on the host by value.
    fill : callable
        Gives arguments and keyword arguments with others in the place of these tensors.
    """

    tensors: tuple[Tensor, ...]
    key: Hashable
    fill: Callable[[Iterable[Tensor]], tuple[list[Any], dict[str, Any]]]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Given | None:
        """Look at arguments; ``None``: one is neither a tensor nor of plain values."""
        tensors, keys, places = list[Tensor](), list[Hashable](), list[int | str]()
        place: int | str
        for place, value in itertools.chain[Any](enumerate(args), sorted(kwargs.items())):
            if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype is torch.bool):
                tensors.append(value)
                places.append(place)
                keys.append((place, value.dtype))
            elif (known := _by_value(value)) is not None:
                keys.append((place, known))
            else:
                return None

        def fill(others: Iterable[Tensor]) -> tuple[list[Any], dict[str, Any]]:
            new, named = list(args), dict(kwargs)
            for place, other in zip(places, others, strict=True):
                if isinstance(place, int):
                    new[place] = other
                else:
                    named[place] = other
            return new, named

        return cls(tuple(tensors), tuple(keys), fill)


def _by_value(value: Any) -> Hashable | None:
    """A plain value, or integers on the host, as part of a key; ``None``: it is neither."""
    if isinstance(value, Tensor):
        return None if value.device.type != "cpu" else (value.dtype, value.shape, tuple(value.flatten().tolist()))
    if isinstance(value, (list, tuple)):
        parts = tuple(map(_by_value, value))
        return None if None in parts else (type(value), parts)
    return (type(value), value) if value is None or isinstance(value, (bool, int, float, str)) else None


class CapturedTower:
    """Programs of a tower that runs by its own modules: those that wait for nothing, as they are.

    Parameters
    ----------
    adapter : ModelAdapter
    pool : GraphPool
    """

    def __init__(self, adapter: ModelAdapter, pool: GraphPool) -> None:
        self._pool = pool
        self._parts, self._tower = adapter.vision.captured, adapter.vision.module
        self._modules = [module for part in self._parts for module in part.module.modules()]
        self._unsupported = unsupported_capture(adapter)
        self._graphs: LRUCache[Hashable, _Program] = LRUCache(_MOST_GRAPHS)
        self._sized: LRUCache[Hashable, _Program] = LRUCache(_MOST_SIZED)
        self._seen: LRUCache[Hashable, object] = LRUCache(_MOST_SEEN)
        self._rooms = _Rooms()

    def __len__(self) -> int:
        return len(self._graphs) + len(self._sized)

    def clear(self) -> None:
        """Free everything."""
        for kept in (self._graphs, self._sized, self._seen, self._rooms):
            kept.clear()

    def unsupported(self) -> str | None:
        """Why the modules run one by one, as they are at present."""
        return self._unsupported or unsupported_captured_mode(self._tower, self._modules)

    @contextlib.contextmanager
    def in_place(self, layers: Iterable[int] | None) -> Iterator[None]:
        """Let calls of the modules, by this thread, run their programs.

        What these give is overwritten when they run again.

        Parameters
        ----------
        layers : iterable of int, optional
            Hidden states of the tower that are read, where it gives any; ``None``: all.
        """
        owner, read = threading.get_ident(), None if layers is None else frozenset(layers)
        try:
            for index, part in enumerate(self._parts):
                part.module.forward = functools.partial(self._call, owner, index, part, read)
            yield
        finally:
            for part in self._parts:
                vars(part.module).pop("forward", None)

    def _call(
        self, owner: int, index: int, part: CapturedModule, layers: frozenset[int] | None, *args: Any, **kwargs: Any
    ) -> Any:
        module = functools.partial(type(part.module).forward, part.module)
        given = _Given.of(args, kwargs) if threading.get_ident() == owner else None
        if given is None or not self._takes(part, given):
            return module(*args, **kwargs)
        n_tiles = given.tensors[0].shape[0] if part.in_tiles else None
        capacity = None if n_tiles is None else tile_capacity(n_tiles)
        shapes = tuple(_with_capacity(tensor.shape, capacity) for tensor in given.tensors)
        key = (index, attention_of(self._tower), layers, given.key, shapes)
        if capacity is None and self._is_new(key):
            return module(*args, **kwargs)

        def record() -> _Program:
            rooms = functools.partial(self._rooms.of, index, capacity is not None)
            return _Program(self._pool, module, given, capacity, rooms, layers)

        return (self._sized if capacity is None else self._graphs).get(key, record)(given.tensors, n_tiles)

    def _takes(self, part: CapturedModule, given: _Given) -> bool:
        device = next(part.module.parameters()).device
        if not given.tensors or any(tensor.device != device for tensor in given.tensors):
            return False
        if not part.in_tiles:
            return all(tensor.numel() <= _MOST_NUMBERS for tensor in given.tensors)
        if "flash" in attention_of(self._tower) and len(given.tensors) > 1:  # it looks for what a mask hides
            return False
        numbers = {tensor.shape[0] if tensor.ndim else 0 for tensor in given.tensors}
        return len(numbers) == 1 and 1 <= min(numbers) <= MOST_TILES

    def _is_new(self, key: Hashable) -> bool:
        """Whether sizes come for the first time: there are too many to record each."""
        mark = object()
        return self._seen.get(key, lambda: mark) is mark


class _Rooms:
    """Memory of inputs and outputs, one for the programs of a module at all capacities of tiles."""

    def __init__(self) -> None:
        self._rooms: dict[Hashable, Tensor] = {}

    def clear(self) -> None:
        self._rooms.clear()

    def of(self, index: int, is_shared: bool, place: int | str, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Room for a tensor of a shape: the first rows of what is shared."""
        if not is_shared:
            return like.new_zeros(shape)
        key = (index, place, like.dtype, shape[1:])
        room = self._rooms.get(key)
        if room is None or room.shape[0] < shape[0]:  # programs before keep theirs
            room = self._rooms[key] = like.new_zeros((power_of_two(shape[0]), *shape[1:]))
        return room[: shape[0]]


class _Program:
    """A module whose inputs and outputs stay where they are.

    Parameters
    ----------
    pool : GraphPool
    module : callable
    given : _Given
    capacity : int, optional
        Of tiles; ``None``: inputs have just the shapes of those given.
    rooms : callable
        Gives memory by place, kind and shape.
    layers : frozenset of int, optional
        Hidden states that are read.
    """

    def __init__(
        self,
        pool: GraphPool,
        module: Callable[..., Any],
        given: _Given,
        capacity: int | None,
        rooms: Callable[[int | str, Tensor, tuple[int, ...]], Tensor],
        layers: frozenset[int] | None,
    ) -> None:
        self._inputs = [
            rooms(f"input {i}", tensor, _with_capacity(tensor.shape, capacity))
            for i, tensor in enumerate(given.tensors)
        ]
        args, kwargs = given.fill(self._inputs)
        self._copy(given.tensors)
        outputs: list[Tensor] = []

        def run() -> Any:
            # Copies: a graph holds the memory of what it gives, and lends that of all else to others.
            result, places = _only(module(*args, **kwargs), layers), itertools.count()

            def keep(tensor: Tensor) -> Tensor:
                place = next(places)
                if place == len(outputs):
                    outputs.append(rooms(place, tensor, tuple(tensor.shape)))
                return outputs[place].copy_(tensor)

            return _each(result, keep)

        self._run = pool.record(run)

    def _copy(self, tensors: Iterable[Tensor]) -> None:
        for room, tensor in zip(self._inputs, tensors, strict=True):
            room[: tensor.shape[0]].copy_(tensor)

    def __call__(self, tensors: Iterable[Tensor], n_tiles: int | None) -> Any:
        """Run on others of these shapes, or of fewer tiles: the rest is what tiles before have left."""
        self._copy(tensors)
        result = self._run()
        return result if n_tiles is None else _each(result, lambda tensor: tensor[:n_tiles])


def _with_capacity(shape: Sequence[int], capacity: int | None) -> tuple[int, ...]:
    return tuple(shape) if capacity is None else (capacity, *shape[1:])


def _only(result: Any, layers: frozenset[int] | None) -> Any:
    """Without the hidden states that nobody reads."""
    states = getattr(result, "hidden_states", None)
    if states is not None and layers is not None:
        read = {layer % len(states) for layer in layers}
        result["hidden_states"] = tuple(state if i in read else None for i, state in enumerate(states))
    return result


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with every tensor changed."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, (tuple, list)):
        return type(result)(_each(part, change) for part in result)
    if isinstance(result, dict):
        return type(result)(**{name: _each(part, change) for name, part in result.items()})
    return result
