"""Colours of windows."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..splits import EVALUATION, TRAINING

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """Colours of a window's parts, and how round its buttons are."""

    ground: Colour
    field: Colour
    bar: Colour
    title: Colour
    title_ink: Colour
    ink: Colour
    line: Colour
    accent: Colour
    accent_ink: Colour
    off: Colour
    radius: int


_ACCENTS: dict[str, tuple[Colour, ...]] = {
    TRAINING: ((40, 100, 210), (20, 130, 90), (190, 60, 40), (120, 70, 190)),
    EVALUATION: ((200, 90, 20), (10, 120, 140), (160, 40, 110)),
}


def pick_theme(rng: random.Random, split: str) -> Theme:
    """A light or a dark theme."""
    accent, radius = rng.choice(_ACCENTS[split]), rng.choice((0, 4, 9))
    shade = rng.randint(-8, 8)
    if rng.random() < 0.6:
        return Theme(
            ground=(240 + shade, 240 + shade, 242 + shade), field=(255, 255, 255), bar=(222 + shade,) * 3,
            title=(205 + shade,) * 3, title_ink=(30, 30, 30), ink=(25, 25, 30), line=(150, 150, 155),
            accent=accent, accent_ink=(255, 255, 255), off=(170, 170, 175), radius=radius,
        )  # fmt: skip
    return Theme(
        ground=(42 + shade,) * 3, field=(28, 28, 32), bar=(62 + shade,) * 3, title=(20, 20, 24),
        title_ink=(230, 230, 230), ink=(232, 232, 235), line=(110, 110, 115), accent=accent,
        accent_ink=(255, 255, 255), off=(95, 95, 100), radius=radius,
    )  # fmt: skip
