"""A sheet of paper that text is set on."""

from __future__ import annotations

import random
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from ..fonts import FONTS, font, pick_font
from ..splits import arrays, sizes
from ..words import filler

LEADING = 1.35  # from line to line, in sizes of the letters
TOKEN = 28  # pixels that a visual token is wide and high in the models that these are sized for
# Columns and rows of visual tokens; each size is of one split.
GRIDS = sizes(((21, 28), (24, 32), (28, 38), (36, 50), (40, 30)), range(20, 45), range(24, 53), range(512, 2049))
Font = ImageFont.FreeTypeFont
Ink = tuple[int, int, int]


class Sheet:
    """A page with a place where the next line goes.

    Parameters
    ----------
    rng : random.Random
    split : str
        Whose sizes and fonts are taken.
    narrow : bool
        Of the upright sizes only.
    grid : tuple of int, optional
        Columns and rows of visual tokens, instead of one of the split's.

    Attributes
    ----------
    image : PIL image
    draw : PIL.ImageDraw.ImageDraw
    margin : int
        Pixels left free at every side.
    y : int
        Top of the next line.
    text_size : int
        Of running text, in pixels.
    """

    def __init__(
        self, rng: random.Random, split: str, *, narrow: bool = False, grid: tuple[int, int] | None = None
    ) -> None:
        columns, rows = grid or rng.choice([one for one in GRIDS[split] if not narrow or one[0] < one[1]])
        self.rng, self.split = rng, split
        paper = rng.randint(228, 255)
        tint = rng.randint(0, 14)
        self.image = Image.new("RGB", (columns * TOKEN, rows * TOKEN), (paper, paper, max(0, paper - tint)))
        self.draw = ImageDraw.Draw(self.image)
        level = rng.randint(0, 70)
        self.ink: Ink = (level, level, level + rng.randint(0, 40))
        self.margin = rng.randint(22, 48)
        self.y = self.margin
        # Wider pages have larger letters as well as more of them.
        self.text_size = rng.randint(15, 16 + self.image.width // 90)
        self.face = pick_font(rng, split)
        self.heading_face = rng.choice(FONTS[split])

    @property
    def width(self) -> int:
        """Pixels between the margins."""
        return self.image.width - 2 * self.margin

    @property
    def left(self) -> int:
        """First pixel of a line."""
        return self.margin

    @property
    def room(self) -> int:
        """Pixels from the next line to the lower margin."""
        return self.image.height - self.margin - self.y

    def font(self, scale: float = 1.0) -> Font:
        """The font of running text, larger or smaller."""
        return font(self.face, round(self.text_size * scale))

    def line(self, text: str, face: Font, *, x: int | None = None, y: int | None = None, anchor: str = "la") -> None:
        """Write one line at a place, which moves nothing."""
        place = (self.left if x is None else x, self.y if y is None else y)
        self.draw.text(place, text, font=face, fill=self.ink, anchor=anchor)

    def heading(self, text: str, scale: float = 1.7) -> None:
        """Write a heading as large as fits, at most ``scale`` times the text, and go below it."""
        size = round(self.text_size * scale)
        while size > 12 and font(self.heading_face, size).getlength(text) > self.width:
            size -= 1
        face = font(self.heading_face, size)
        centred = self.rng.random() < 0.5
        x = self.left + round(self.width - face.getlength(text)) // 2 if centred else self.left
        self.line(text, face, x=x)
        self.y += round(1.6 * size)

    def fill(self, share: float) -> None:
        """Set sentences that nothing is asked about until a share of what is free is filled."""
        leading, face = round(LEADING * self.text_size), self.font()
        bottom = self.y + share * self.room
        while True:
            lines = wrap(" ".join(filler(self.rng, self.split, self.rng.randint(2, 5))), face, self.width)
            if self.y + (len(lines) + 1) * leading > bottom:
                return
            for line in lines:
                self.line(line, face)
                self.y += leading
            self.y += leading

    def finish(self) -> Image.Image:
        """The picture, one in three as if scanned: with a little noise."""
        if self.rng.random() < 0.33:
            grain = arrays(self.rng).randint(0, 256, (self.image.height, self.image.width)).astype("uint8")
            speckle = Image.fromarray(grain).convert("RGB")
            self.image = Image.blend(self.image, speckle, self.rng.uniform(0.03, 0.1))
        return self.image


def wrap(text: str, face: Font, width: int) -> list[str]:
    """Lines of a text that are at most ``width`` pixels wide."""
    lines: list[list[str]] = [[]]
    space, used = _length(face, " "), 0.0
    for word in text.split():
        length = _length(face, word)
        if lines[-1] and used + space + length > width:
            lines.append([])
        used = length if not lines[-1] else used + space + length
        lines[-1].append(word)
    return [" ".join(line) for line in lines if line]


@lru_cache(maxsize=8192)
def _length(face: Font, word: str) -> float:
    return face.getlength(word)
