"""Patch pruning before the vision tower: drops the parts of an image that look like everything around them.

What stands for a visual token, a square of patches, is compared with its four neighbours by its pixels, in a video
with its place in the frame before as well. It is left out if none of these differs much; so the edges of a plain
surface stay, and its inside goes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .tables import VisionInputs, VisionShape

Grid = tuple[int, int, int]


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


@functools.lru_cache(maxsize=256)
def neighbours(grids: tuple[Grid, ...]) -> Tensor:
    """Neighbours of every token: to the right, below, to the left, above, and in the frame before; -1: none.

    Parameters
    ----------
    grids : tuple of (t, h, w)
        In tokens.

    Returns
    -------
    Tensor of shape (5, n_tokens), int64
    """
    found, start = [], 0
    for t, h, w in grids:
        index = torch.arange(start, start + t * h * w, device="cpu").view(t, h, w)
        own = torch.full((5, t, h, w), -1, dtype=torch.int64, device="cpu")
        own[0, :, :, :-1], own[2, :, :, 1:] = index[:, :, 1:], index[:, :, :-1]
        own[1, :, :-1], own[3, :, 1:] = index[:, 1:], index[:, :-1]
        own[4, 1:] = index[:-1]
        found.append(own.flatten(1))
        start += t * h * w
    return torch.cat(found, dim=1)


@dataclass(frozen=True)
class ChoiceInputs:
    """What the choice has to know of the grids, as parts of one tensor; padding included.

    Attributes
    ----------
    neighbours : Tensor of shape (5, n_tokens), int64
        See :func:`neighbours`.
    image_idx : Tensor of shape (n_tokens,), int64
        Image of every token; padding is of one behind the last.
    starts, n_kept : Tensor of shape (n_images + 1,), int64
        First token of every image, and how many of it are kept; of padding none.
    """

    neighbours: Tensor
    image_idx: Tensor
    starts: Tensor
    n_kept: Tensor

    @classmethod
    def of(cls, n_tokens: int, n_images: int, integers: Tensor) -> ChoiceInputs:
        """Views of the first of ``integers``."""
        shapes = _shapes(n_tokens, n_images)
        parts = integers[: sum(map(math.prod, shapes))].split([math.prod(one) for one in shapes])
        return cls(*(part.view(one) for part, one in zip(parts, shapes, strict=True)))

    def fill(self, grids: tuple[Grid, ...], numbers: Sequence[int]) -> None:
        """Take some grids, and the numbers of tokens that are kept of each, on the host."""
        sizes = torch.tensor([t * h * w for t, h, w in grids], device="cpu")
        n_tokens = int(sizes.sum())
        self.neighbours.fill_(-1)
        self.neighbours[:, :n_tokens] = neighbours(grids)
        self.image_idx.fill_(len(grids))
        self.image_idx[:n_tokens] = torch.arange(len(grids), device="cpu").repeat_interleave(sizes)
        self.starts[0], self.starts[1:] = 0, sizes.cumsum(0)
        self.n_kept[:-1], self.n_kept[-1] = torch.tensor(numbers, device="cpu"), 0


def _shapes(n_tokens: int, n_images: int) -> list[tuple[int, ...]]:
    return [(5, n_tokens), (n_tokens,), (n_images + 1,), (n_images + 1,)]


def n_choice_integers(n_tokens: int, n_images: int) -> int:
    """Integers of :class:`ChoiceInputs`."""
    return sum(math.prod(one) for one in _shapes(n_tokens, n_images))


def patch_saliency(tokens: Tensor, near: Tensor) -> Tensor:
    """Distance of a token from the neighbour that it is least like; in a video no more than from the frame before.

    Parameters
    ----------
    tokens : Tensor of shape (n_tokens, size)
        Pixels, in reading order.
    near : Tensor of shape (5, n_tokens), int64
        From :func:`neighbours`.

    Returns
    -------
    Tensor of shape (n_tokens,), float32
        Root mean square of the difference.
    """
    exact = tokens.float()

    def distance(to: Tensor) -> Tensor:
        return (exact[to.clamp_min(0)] - exact).square().mean(dim=-1).sqrt().masked_fill(to < 0, 0.0)

    def from_other_side(distances: Tensor, to: Tensor) -> Tensor:
        return distances[to.clamp_min(0)].masked_fill(to < 0, 0.0)

    right, below = distance(near[0]), distance(near[1])
    sides = (right, below, from_other_side(right, near[2]), from_other_side(below, near[3]))
    found = torch.stack(sides).amax(dim=0)
    return torch.where(near[4] < 0, found, torch.minimum(found, distance(near[4])))


def choose(tokens: Tensor, choice: ChoiceInputs, whole: VisionInputs, part: VisionInputs, shape: VisionShape) -> Tensor:
    """The most salient tokens of every image; waits for nothing.

    Parameters
    ----------
    tokens : Tensor of shape (n_tokens, size)
        Pixels, in reading order, image behind image, padding behind.
    choice : ChoiceInputs
    whole, part : VisionInputs
        Of all tokens, and of those that are kept: written.
    shape : VisionShape
        Capacities of ``part``.

    Returns
    -------
    Tensor of shape (n_kept,), int64
        In reading order, padding behind.
    """
    n_tokens, n_left = tokens.shape[0], part.order.shape[0]
    per_token = whole.positions.shape[0] // n_tokens
    everything = torch.arange(n_tokens, device=tokens.device)
    ranked = patch_saliency(tokens, choice.neighbours).sort(descending=True, stable=True).indices
    ranked = ranked[choice.image_idx[ranked].sort(stable=True).indices]  # image by image
    image = choice.image_idx[ranked]
    is_kept = torch.zeros_like(choice.image_idx, dtype=torch.bool)
    is_kept[ranked] = everything - choice.starts[image] < choice.n_kept[image]
    kept = torch.argsort(~is_kept, stable=True)[:n_left]
    in_order = is_kept[whole.order]
    places = torch.argsort(~in_order, stable=True)[:n_left]
    number = is_kept.sum()
    part.order.copy_(whole.order[places])
    behind = everything[:n_left] >= number
    part.back.copy_(torch.argsort(torch.where(behind, n_tokens + everything[:n_left], part.order)))
    for own, all_of_them in ((part.positions, whole.positions), (part.sizes, whole.sizes)):
        if own.shape[0]:
            own.copy_(all_of_them.unflatten(0, (-1, per_token))[places].flatten(0, 1))
    before = torch.nn.functional.pad(in_order.cumsum(0), (1, 0)) * per_token
    for own, starts, longest in (
        (part.frames, whole.frames, shape.longest_frame),
        (part.windows, whole.windows, shape.longest_window),
    ):
        left = before[starts // per_token]
        steps = torch.arange(1, own.shape[0] - left.shape[0] + 1, device=tokens.device)
        own.copy_(torch.cat([left, (number * per_token + steps * longest).clamp_max(shape.patches)]))
    part.n_patches.copy_(number * per_token)
    return kept
