"""Arrangement of an image's visual tokens in a prompt: one grid, or tiles with separators among them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Tiles:
    """Visual tokens of one image that stand in parts: grids one behind the other, with separators among them.

    Separators are placeholders like the others, but stand for no patch, such as the ``image_newline`` of LLaVA-NeXT.

    Attributes
    ----------
    parts : tuple of (t, h, w)
    ends_rows : tuple of bool
        By part: whether a separator ends each of its rows.
    ends_all : bool
        Whether a separator stands behind the last part.
    columns : tuple of int
        By part: how many of its ``t`` grids lie beside each other as tiles of the picture, row by row of tiles; 0: not
        known. Empty: no part is in tiles.
    """

    parts: tuple[Grid, ...]
    ends_rows: tuple[bool, ...]
    ends_all: bool = False
    columns: tuple[int, ...] = ()


Layout = Grid | Tiles
View = tuple[int, int, int, int]


def views(layout: Layout) -> tuple[View, ...]:
    """Views (rows, columns, height, width) of a picture, one behind the other; empty for a single grid and for a video.

    Each is of ``rows`` times ``columns`` tiles of ``height`` times ``width`` tokens, separators apart. 0 columns: of
    ``rows`` tiles whose arrangement is not known.
    """
    if not isinstance(layout, Tiles) or (not layout.columns and any(t > 1 for t, _, _ in layout.parts)):
        return ()
    columns = layout.columns or (1,) * len(layout.parts)
    return tuple((t // (n or 1), n, h, w) for (t, h, w), n in zip(layout.parts, columns, strict=True))


def as_grid(layout: Layout) -> Grid | None:
    """Grid (t, h, w) of a layout, separators apart, tiles of one size one behind the other; ``None``: it has none."""
    if not isinstance(layout, Tiles):
        return layout
    if len(layout.parts) == 1:
        return layout.parts[0]
    sizes = {part[1:] for part in layout.parts}
    if len(sizes) > 1 or layout.ends_all or any(layout.ends_rows):
        return None
    return (sum(t for t, _, _ in layout.parts), *sizes.pop())


def n_tokens(layout: Layout) -> int:
    """Number of placeholders of an image, separators included."""
    if not isinstance(layout, Tiles):
        return math.prod(layout)
    sizes = (t * h * (w + ends) for (t, h, w), ends in zip(layout.parts, layout.ends_rows, strict=True))
    return sum(sizes) + layout.ends_all


def separators(layout: Layout) -> Tensor:
    """Mask of the placeholders of an image that stand for no patch, (n,), bool."""
    if not isinstance(layout, Tiles):
        return torch.zeros(n_tokens(layout), dtype=torch.bool, device="cpu")
    marks = []
    for (t, h, w), ends in zip(layout.parts, layout.ends_rows, strict=True):
        row = torch.tensor([False] * w + [True] * ends, dtype=torch.bool, device="cpu")
        marks.append(row.repeat(t * h))
    return torch.cat([*marks, torch.ones(int(layout.ends_all), dtype=torch.bool, device="cpu")])


@functools.lru_cache(maxsize=32)
def places(layouts: tuple[Layout, ...]) -> Tensor:
    """Coordinates (time, height, width) of the placeholders of some images, (3, n), int64.

    Images, and parts of one, stand one behind the other in time. A separator stands right of its row.
    """
    found, start = [torch.zeros((3, 0), dtype=torch.int64, device="cpu")], 0
    for layout in layouts:
        tiles = layout if isinstance(layout, Tiles) else Tiles((layout,), (False,))
        for (t, h, w), ends in zip(tiles.parts, tiles.ends_rows, strict=True):
            axes = (torch.arange(*ends_of, device="cpu") for ends_of in ((start, start + t), (0, h), (0, w + ends)))
            found.append(torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
            start += t
        if tiles.ends_all:
            _, h, w = tiles.parts[-1]
            found.append(torch.tensor([[start - 1], [h - 1], [w]], device="cpu"))
    return torch.cat(found, dim=1)


def grid_coordinates(layouts: Iterable[Layout], visual: Tensor) -> Tensor:
    """Coordinates of a sample's visual tokens by the layouts of its images, separators among them or not; by the place
    in the prompt where these do not fit.

    Parameters
    ----------
    layouts : iterable of Layout
    visual : Tensor of shape (n_visual,), int64
        Where the tokens are.

    Returns
    -------
    Tensor of shape (3, n_visual), int64
    """
    layouts = tuple(layouts)
    found = places(layouts)
    if found.shape[1] != visual.shape[0] and any(isinstance(layout, Tiles) for layout in layouts):
        found = found[:, ~torch.cat([separators(layout) for layout in layouts])]
    if not layouts or found.shape[1] != visual.shape[0]:
        return visual.expand(3, -1)
    return found.to(visual.device)
