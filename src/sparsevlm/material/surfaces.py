"""Surfaces of a given size: noise, gradients, textures, collages, strokes."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .photos import crop
from .splits import arrays

Colour = tuple[int, int, int]
Size = tuple[int, int]

PATTERNS = ("stripes", "checks", "dots", "waves", "bricks")


def muted(rng: random.Random, low: int = 45, high: int = 205, tint: int = 30) -> Colour:
    """A colour with little in it, so that what has colour can be told from it."""
    level = rng.randint(low, high)
    red, green, blue = (max(0, min(255, level + rng.randint(-tint, tint))) for _ in range(3))
    return red, green, blue


def noise(rng: random.Random, size: Size) -> Image.Image:
    """Coloured noise of several grains, fine to coarse."""
    width, height = size
    draws = arrays(rng)
    total = np.zeros((height, width, 3), np.float32)
    weights = [rng.uniform(0.2, 1.0) for _ in range(4)]
    for weight, grain in zip(weights, (1, 4, 14, 56), strict=True):
        shape = (max(2, math.ceil(height / grain)), max(2, math.ceil(width / grain)), 3)
        coarse = Image.fromarray(draws.randint(0, 256, shape).astype(np.uint8))
        total += weight * np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32)
    total = (total / sum(weights) - 127.5) * rng.uniform(1.0, 1.5) + rng.uniform(95, 160)
    return _image(total)


def gradient(rng: random.Random, size: Size) -> Image.Image:
    """Colours that run into each other."""
    corners = [[muted(rng, 20, 235, 60) for _ in range(rng.randint(2, 3))] for _ in range(2)]
    columns = min(map(len, corners))
    few = np.array([row[:columns] for row in corners], np.uint8)
    return Image.fromarray(few).resize(size, Image.Resampling.BICUBIC)


def texture(rng: random.Random, size: Size) -> Image.Image:
    """One of ``PATTERNS`` in two greyish colours, turned by any angle."""
    one = muted(rng, 40, 120)
    red, green, blue = (min(255, channel + rng.randint(45, 100)) for channel in one)
    kind, other = rng.choice(PATTERNS), (red, green, blue)
    if kind == "bricks":  # dark ones, with light joints
        one, other = other, one
    return pattern(rng, size, kind, one, other, rng.uniform(8, 44), rng.uniform(0, math.pi))


def pattern(
    rng: random.Random, size: Size, kind: str, ground: Colour, ink: Colour, period: float, angle: float
) -> Image.Image:
    """A pattern all over a picture.

    Parameters
    ----------
    rng : random.Random
    size : tuple of int
        Width and height in pixels.
    kind : str
        One of ``PATTERNS``.
    ground, ink : tuple of int
        RGB.
    period : float
        Pixels after which it comes again.
    angle : float
        Radians.
    """
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shift = rng.uniform(0, period)
    along = (x * math.cos(angle) + y * math.sin(angle) + shift) / period
    across = (y * math.cos(angle) - x * math.sin(angle) + shift) / period
    inked = _PATTERNS[kind](along, across)
    colours = np.array([ground, ink], np.uint8)
    return Image.fromarray(colours[inked.astype(np.int64)])


def collage(rng: random.Random, size: Size, split: str) -> Image.Image:
    """Pieces of several photographs side by side, cut anywhere."""
    columns, rows = _cuts(rng, size[0]), _cuts(rng, size[1])
    whole = Image.new("RGB", size)
    for left, right in itertools.pairwise(columns):
        for top, bottom in itertools.pairwise(rows):
            whole.paste(crop(rng, split, (right - left, bottom - top)), (left, top))
    return whole


def strokes(rng: random.Random, image: Image.Image, count: int) -> None:
    """Draw lines and open arcs of any colour on a picture."""
    draw, (width, height) = ImageDraw.Draw(image), image.size
    for _ in range(count):
        colour = tuple(rng.randint(10, 245) for _ in range(3))
        x, y, reach, thick = rng.randint(0, width), rng.randint(0, height), rng.randint(30, 200), rng.randint(2, 5)
        if rng.random() < 0.6:
            angle = rng.uniform(0, 2 * math.pi)
            draw.line((x, y, x + reach * math.cos(angle), y + reach * math.sin(angle)), fill=colour, width=thick)
        else:
            start = rng.randint(0, 359)
            draw.arc((x - reach, y - reach, x + reach, y + reach), start, start + rng.randint(30, 150), colour, thick)


def _image(values: NDArray[np.float32]) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _cuts(rng: random.Random, length: int) -> list[int]:
    """Where a side is cut, ends included; no piece is shorter than a sixth of it."""
    n_pieces, least = rng.randint(2, 4), length // 6
    spare = sorted(rng.randint(0, length - n_pieces * least) for _ in range(n_pieces - 1))
    return [0, *(least * (i + 1) + cut for i, cut in enumerate(spare)), length]


def _checks(along: NDArray[np.float32], across: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (np.floor(2 * along) + np.floor(2 * across)) % 2 < 1


def _dots(along: NDArray[np.float32], across: NDArray[np.float32]) -> NDArray[np.bool_]:
    return (along % 1 - 0.5) ** 2 + (across % 1 - 0.5) ** 2 < 0.11


def _bricks(along: NDArray[np.float32], across: NDArray[np.float32]) -> NDArray[np.bool_]:
    row = np.floor(2 * across)
    return ((2 * across) % 1 >= 0.16) & ((along + 0.5 * (row % 2)) % 1 >= 0.08)


_PATTERNS = {
    "stripes": lambda along, across: along % 1 < 0.5,
    "checks": _checks,
    "dots": _dots,
    "waves": lambda along, across: (along + 0.25 * np.sin(2 * math.pi * across)) % 1 < 0.5,
    "bricks": _bricks,
}
