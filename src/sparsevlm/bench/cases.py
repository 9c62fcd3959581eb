"""Benchmark cases: batches of equal requests, requests of mixed shapes, and pictures."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

N_TEXT = 42  # tokens of a request that are not visual: a short question in its template
_PIXELS = 28  # of an image, along one side of a visual token
_PER_OCTAVE = 8


@dataclass(frozen=True)
class Case:
    """A batch of equal requests.

    Attributes
    ----------
    n_visual : int
        Visual tokens of each sample: one image, or several where a model's images have fewer.
    batch, new_tokens : int
    n_text : int
        Tokens of each sample that are not visual.
    height : int, optional
        Visual tokens along the height of the image; ``None``: it is as near to a square as up to 2 to 1 allows.
    """

    n_visual: int
    batch: int
    new_tokens: int
    n_text: int = N_TEXT
    height: int | None = None

    @property
    def name(self) -> str:
        """Name in the rows, such as ``v1024-b1-n64``."""
        return f"v{self.n_visual}-b{self.batch}-n{self.new_tokens}"

    @property
    def grid(self) -> tuple[int, int]:
        """Visual tokens along height and width of the image; fewer than asked for where no such image has as many."""
        side = math.isqrt(self.n_visual)
        exact = (h for h in range(side, 0, -1) if self.n_visual % h == 0 and self.n_visual <= 2 * h * h)
        height = self.height or next(exact, side)
        return height, self.n_visual // height

    @property
    def of_one_image(self) -> Case:
        """The same with as many visual tokens as one image of its grid has."""
        return dataclasses.replace(self, n_visual=math.prod(self.grid), height=self.grid[0])


@dataclass(frozen=True)
class PictureCase:
    """A decoded square picture and a question, from the processor on.

    Attributes
    ----------
    side : int
        Pixels.
    batch, new_tokens : int
    """

    side: int
    batch: int = 1
    new_tokens: int = 1

    @property
    def name(self) -> str:
        """Name in the rows, such as ``picture896-b1-n1``."""
        return f"picture{self.side}-b{self.batch}-n{self.new_tokens}"

    @property
    def n_visual(self) -> int:
        """Visual tokens of the picture."""
        return (self.side // _PIXELS) ** 2

    @property
    def request(self) -> Case:
        """The same as inputs of the model."""
        return Case(self.n_visual, self.batch, self.new_tokens)


@dataclass(frozen=True)
class MixedCase:
    """Requests one after the other, each with an image of another size.

    Image sizes are drawn evenly on a logarithmic scale, with sides of up to 2 to 1; text lengths evenly.

    Attributes
    ----------
    n_requests, new_tokens : int
    visual, text : tuple of int
        Least and most tokens of a request.
    """

    n_requests: int
    new_tokens: int = 16
    visual: tuple[int, int] = (200, 4000)
    text: tuple[int, int] = (20, 200)

    batch: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """Name in the rows, such as ``mixed200``."""
        return f"mixed{self.n_requests}"

    def requests(self, seed: int) -> tuple[Case, ...]:
        """Draw the requests; no two have an image of the same size."""
        drawn = self._drawn(seed)
        assert len(drawn) >= self.n_requests  # so many sizes of images there are
        return drawn[: self.n_requests]

    def warmup_requests(self, seed: int) -> tuple[Case, ...]:
        """Draw requests to begin with, one of each size class; none has an image of a size that is measured."""
        one_each: dict[int, Case] = {}
        for request in self._drawn(seed)[self.n_requests :]:
            one_each.setdefault(size_class(request), request)
        return tuple(one_each.values())

    def _drawn(self, seed: int) -> tuple[Case, ...]:
        """All sizes of images in the order of a weighted draw without replacement."""
        generator, (least, most) = random.Random(seed), self.visual
        sides = range(1, math.isqrt(2 * most) + 1)
        grids = [(h, w) for h in sides for w in sides if least <= h * w <= most and max(h, w) <= 2 * min(h, w)]
        # There are about as many grids of any size: with a weight of 1 / size they are even on a logarithmic scale.
        order = sorted(grids, key=lambda grid: -math.log(1.0 - generator.random()) * grid[0] * grid[1])
        texts = [generator.randint(*self.text) for _ in order]
        return tuple(
            Case(h * w, self.batch, self.new_tokens, n_text, h) for (h, w), n_text in zip(order, texts, strict=True)
        )


AnyCase: TypeAlias = Case | PictureCase | MixedCase


def size_class(request: Case) -> int:
    """Class of requests of like size: eighths of an octave of their tokens."""
    return math.floor(_PER_OCTAVE * math.log2(request.n_visual + request.n_text))


def like_sized(requests: Sequence[Case], least: int) -> list[list[int]]:
    """Group requests by size class; a class with fewer than ``least`` of them is joined with the next larger.

    Returns
    -------
    list of list of int
        Indices of the requests of each group.
    """
    by_class: dict[int, list[int]] = {}
    for i in sorted(range(len(requests)), key=lambda i: size_class(requests[i])):
        by_class.setdefault(size_class(requests[i]), []).append(i)
    groups: list[list[int]] = []
    for members in by_class.values():
        if groups and len(groups[-1]) < least:
            groups[-1] += members
        else:
            groups.append(members)
    if len(groups) > 1 and len(groups[-1]) < least:
        last = groups.pop()
        groups[-1] += last
    return groups


def _cases(n_visual: tuple[int, ...], batch: int, new_tokens: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(Case(n, batch, new) for n in n_visual for new in new_tokens)


CORE: tuple[AnyCase, ...] = (
    *_cases((256, 576, 1024, 4096), 1, (1, 64)),
    *_cases((256, 1024), 32, (1, 64)),
    PictureCase(896),
    MixedCase(24),
)
FULL: tuple[AnyCase, ...] = (
    *CORE,
    *_cases((16384,), 1, (1, 64)),
    *_cases((256, 1024, 4096), 8, (1, 64)),
    *_cases((576, 1024), 1, (256,)),
    *(PictureCase(side) for side in (448, 1792)),
    MixedCase(200),
)
_BY_NAME = {case.name: case for case in FULL}
_EQUAL = re.compile(r"v([1-9]\d*)-b([1-9]\d*)-n([1-9]\d*)")  # names of batches of equal requests


def named_cases(names: tuple[str, ...] | None, *, full: bool) -> tuple[AnyCase, ...]:
    """Returns cases by their names, or all; a batch of equal requests may have other numbers than those that exist.

    Raises
    ------
    ValueError
        If there is no such case; the message lists those that exist.
    """
    if names is None:
        return FULL if full else CORE
    found = {name: _BY_NAME.get(name) or _equal_requests(name) for name in names}
    if unknown := [name for name, case in found.items() if case is None]:
        raise ValueError(
            f"there is no case {', '.join(unknown)}; there are {', '.join(_BY_NAME)}, and any other "
            "v<visual tokens>-b<batch>-n<new tokens>."
        )
    return tuple(case for case in found.values() if case is not None)


def _equal_requests(name: str) -> Case | None:
    numbers = _EQUAL.fullmatch(name)
    return None if numbers is None else Case(*map(int, numbers.groups()))
