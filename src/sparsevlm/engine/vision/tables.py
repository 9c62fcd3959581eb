"""What the tower's programs are told of the grids of a call: tables made on the host, and their capacities."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ..capacities import power_of_two, row_capacity

Grids = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class VisionShape:
    """Capacities of a program of the tower.

    Attributes
    ----------
    patches : int
    frames, windows : int
        Sequences in blocks with full attention, and in the others. A single frame counts as none: it begins with the
        first patch.
    longest_frame, longest_window : int
        Patches of the longest, at most.
    is_sized : bool
        Whether the size of each patch's image is told as well.
    """

    patches: int
    frames: int
    windows: int
    longest_frame: int
    longest_window: int
    is_sized: bool = False

    def only(self, n_patches: int) -> VisionShape:
        """Where no more than ``n_patches`` are computed: windows lose some, and what fills up has windows as well."""
        patches = row_capacity(n_patches)
        windows = self.windows and self.windows + -(-patches // self.longest_window)
        frames = self.frames and self.frames + -(-patches // self.longest_frame)
        return VisionShape(patches, frames, windows, self.longest_frame, self.longest_window, self.is_sized)


@dataclass(frozen=True)
class HostTables:
    """Tables of a set of grids, on the host.

    Attributes
    ----------
    order : Tensor of shape (n_tokens,), int64
        Visual tokens in the order in which the tower works: by windows, where it has any.
    positions, sizes : Tensor of shape (n_patches, 2), int64
        Rows and columns in that order, and how many of both the image has.
    frames, windows : Tensor of shape (n + 1,), int64
        Where sequences begin.
    """

    order: Tensor
    positions: Tensor
    sizes: Tensor
    frames: Tensor
    windows: Tensor

    @property
    def n_patches(self) -> int:
        """Patches of all images."""
        return self.positions.shape[0]

    def shape(self, is_sized: bool = False) -> VisionShape:
        """Capacities of the program that runs it."""
        patches = row_capacity(self.n_patches)
        frames = (0, patches) if self.frames.shape[0] == 2 else _sequences(self.frames, patches)
        windows = frames if self.windows is self.frames else _sequences(self.windows, patches)
        return VisionShape(patches, frames[0], windows[0], frames[1], windows[1], is_sized)


def _sequences(starts: Tensor, patches: int) -> tuple[int, int]:
    """Capacities of their number and of the longest; what fills up behind them comes in parts no longer than that."""
    longest = power_of_two(int(starts.diff().max()))
    number = starts.shape[0] - 1 + -(-(patches - int(starts[-1])) // longest)
    usual = 2 * -(-patches // longest)
    return (usual if number <= usual else power_of_two(number)), longest


def host_tables(side: int, window: int | None, grids: Grids) -> HostTables:
    """Tables of a set of grids (t, h, w), in visual tokens.

    Parameters
    ----------
    side : int
        Patches per side of a visual token.
    window : int or None
        Visual tokens per side of a window.
    grids : tuple of (t, h, w)
    """
    in_patches = torch.tensor([(t, h * side, w * side) for t, h, w in grids], dtype=torch.int64, device="cpu")
    positions = get_vision_position_ids(in_patches, side)
    sizes = torch.repeat_interleave(in_patches[:, 1] * in_patches[:, 2], in_patches[:, 0])
    frames = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    of_patches = torch.repeat_interleave(in_patches[:, 1:], in_patches.prod(dim=1), dim=0)
    if window is None:
        order = torch.arange(positions.shape[0] // side**2, device="cpu")
        return HostTables(order, positions, of_patches, frames, frames)
    order, starts = get_vision_window_index(in_patches, side, window * side, 1)
    positions, of_patches = (one.unflatten(0, (-1, side**2))[order].flatten(0, 1) for one in (positions, of_patches))
    return HostTables(order, positions, of_patches, frames, torch.as_tensor(starts, dtype=torch.int64))


@dataclass(frozen=True)
class VisionInputs:
    """What the grids of a call bring, as parts of one tensor; padding included.

    Attributes
    ----------
    order : Tensor of shape (n_tokens,), int64
        Visual tokens in the order in which the tower works, as indices into those whose patches are given.
    back : Tensor of shape (n_tokens,), int64
        Places in that order, of the visual tokens in reading order.
    positions : Tensor of shape (patches, 2), int64
        In the order of the tower.
    frames : Tensor of shape (frames + 1,), int64
    windows : Tensor of shape (windows + 1,), int64
    n_patches : Tensor of shape (1,), int64
    sizes : Tensor of shape (patches, 2), int64
        Of the images, or of shape (0, 2).
    """

    order: Tensor
    back: Tensor
    positions: Tensor
    frames: Tensor
    windows: Tensor
    n_patches: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, shape: VisionShape, per_token: int, integers: Tensor) -> VisionInputs:
        """Views of the first of ``integers``."""
        shapes = _shapes(shape, per_token)
        parts = integers[: sum(map(math.prod, shapes))].split([math.prod(one) for one in shapes])
        return cls(*(part.view(one) for part, one in zip(parts, shapes, strict=True)))

    def fill(self, tables: HostTables, shape: VisionShape) -> None:
        """Take the tables of some grids, on the host."""
        n_tokens = tables.order.shape[0]
        torch.arange(self.order.shape[0], out=self.order)
        self.order[:n_tokens] = tables.order
        self.back[self.order] = torch.arange(self.order.shape[0], device="cpu")
        self.positions.zero_()
        self.positions[: tables.n_patches] = tables.positions
        _fill_starts(self.frames, tables.frames, shape.longest_frame, shape.patches)
        _fill_starts(self.windows, tables.windows, shape.longest_window, shape.patches)
        self.n_patches.fill_(tables.n_patches)
        self.sizes.fill_(1)
        if shape.is_sized:
            self.sizes[: tables.n_patches] = tables.sizes


def _fill_starts(room: Tensor, starts: Tensor, longest: int, end: int) -> None:
    if room.shape[0] == 1:
        room.zero_()
        return
    padding = [*range(int(starts[-1]) + longest, end, longest)]
    room.fill_(end)
    room[: starts.shape[0]] = starts
    room[starts.shape[0] : starts.shape[0] + len(padding)] = torch.tensor(padding, dtype=torch.int64)


def _shapes(shape: VisionShape, per_token: int) -> list[tuple[int, ...]]:
    n_tokens = shape.patches // per_token
    sizes = (shape.patches * shape.is_sized, 2)
    return [(n_tokens,), (n_tokens,), (shape.patches, 2), (shape.frames + 1,), (shape.windows + 1,), (1,), sizes]


@functools.lru_cache(maxsize=64)
def host_integers(side: int, window: int | None, is_sized: bool, grids: Grids) -> tuple[VisionShape, Tensor]:
    """Capacities for a set of grids, and the integers that they bring, on the host; see :func:`host_tables`."""
    tables = host_tables(side, window, grids)
    shape = tables.shape(is_sized)
    integers = torch.zeros(n_integers(shape, side**2), dtype=torch.int64, device="cpu")
    VisionInputs.of(shape, side**2, integers).fill(tables, shape)
    return shape, integers


def n_integers(shape: VisionShape, per_token: int) -> int:
    """Integers that the grids of a call bring."""
    return sum(math.prod(one) for one in _shapes(shape, per_token))
