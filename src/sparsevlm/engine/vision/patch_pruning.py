"""Patch pruning before the vision tower: drops the parts of an image that look like everything around them.

What stands for a visual token, a square of patches, is compared with its four neighbours by its pixels, in a video
with its place in the frame before as well. It is left out if none of these differs much; so the edges of a plain
surface stay, and its inside goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class KeptPatches:
    """Visual tokens that are computed.

    Attributes
    ----------
    tokens : Tensor of shape (n_kept,), int64
        In reading order, ascending.
    working : Tensor of shape (n_kept,), int64
        The same in the order in which the tower works.
    places : Tensor of shape (n_kept,), int64
        Of ``working`` in that order, among all tokens.
    back : Tensor of shape (n_kept,), int64
        From ``working`` to ``tokens``.
    before : Tensor of shape (n_tokens + 1,), int64
        How many are kept before each place of that order.
    """

    tokens: Tensor
    working: Tensor
    places: Tensor
    back: Tensor
    before: Tensor

    @classmethod
    def empty(cls, n_kept: int, n_tokens: int, device: torch.device) -> KeptPatches:
        """Room for a choice."""
        lengths = (n_kept, n_kept, n_kept, n_kept, n_tokens + 1)
        return cls(*(torch.zeros(length, dtype=torch.int64, device=device) for length in lengths))

    def become(self, other: KeptPatches) -> None:
        """Hold what another choice holds."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


def n_kept(grids: Sequence[Grid], share: float, min_keep: int = 1, min_keep_per_image: int = 0) -> list[int]:
    """Number of tokens of each image of a sample that are computed: a share of them, and no fewer than the floors.

    Parameters
    ----------
    grids : sequence of (t, h, w)
        In tokens.
    share : float
        In (0, 1].
    min_keep : int
        Of all images together; each has its part by its size.
    min_keep_per_image : int
        Of each, where there are several; one at least.
    """
    sizes = [t * h * w for t, h, w in grids]
    n_visual, floor = sum(sizes), min_keep_per_image if len(sizes) > 1 else 1
    parts = [-(-min(min_keep, n_visual) * n // n_visual) for n in sizes]
    return [min(n, max(1, round(share * n), part, floor)) for n, part in zip(sizes, parts, strict=True)]


def patch_saliency(tokens: Tensor, grid: Grid) -> Tensor:
    """Distance of a token from the neighbour that it is least like; in a video no more than from the frame before.

    Parameters
    ----------
    tokens : Tensor of shape (t · h · w, size)
        Pixels, in reading order.
    grid : (t, h, w)

    Returns
    -------
    Tensor of shape (t · h · w,), float32
        Root mean square of the difference.
    """
    frames = tokens.float().unflatten(0, grid)
    found = frames.new_zeros(grid)
    for dim, length in ((1, grid[1]), (2, grid[2])):
        if length > 1:
            step = frames.diff(dim=dim).square().mean(dim=-1).sqrt()
            first, second = found.narrow(dim, 0, length - 1), found.narrow(dim, 1, length - 1)
            first.copy_(torch.maximum(first, step))
            second.copy_(torch.maximum(second, step))
    if grid[0] > 1:
        found[1:] = torch.minimum(found[1:], frames.diff(dim=0).square().mean(dim=-1).sqrt())
    return found.flatten()


def choose(tokens: Tensor, grids: Sequence[Grid], numbers: Sequence[int], order: Tensor | None) -> KeptPatches:
    """The most salient tokens of every image; waits for nothing.

    Parameters
    ----------
    tokens : Tensor of shape (n_tokens, size)
        Pixels, in reading order, image behind image.
    grids : sequence of (t, h, w)
        In tokens.
    numbers : sequence of int
        Tokens of each image that are kept.
    order : Tensor of shape (n_tokens,), int64, optional
        The token at each place of the order in which the tower works; ``None``: reading order.
    """
    sizes = [t * h * w for t, h, w in grids]
    found, start = [], 0
    for own, grid, number in zip(tokens.split(sizes), grids, numbers, strict=True):
        ranked = patch_saliency(own, grid).sort(descending=True, stable=True).indices
        found.append(start + ranked[:number].sort().values)
        start += own.shape[0]
    kept = torch.cat(found)
    if order is None:
        order = torch.arange(tokens.shape[0], device=tokens.device)
    mask = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device).index_fill(0, kept, True)[order]
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    places = torch.argsort(~mask, stable=True)[: kept.shape[0]]
    working = order[places]
    return KeptPatches(kept, working, places, torch.argsort(working), before)
