"""Which pieces of text and which letters the visual tokens of a drawn picture show."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import findfont
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont
from transformers import PreTrainedTokenizerFast

from training.groups import TOKEN

# A visual token is asked for the letters in its cells: columns narrower than most letters, rows about a line high.
CELL_ROWS, CELL_COLUMNS = 2, 7
CELLS = CELL_ROWS * CELL_COLUMNS
NO_LETTER, UNKNOWN = 0, 255
_FIRST, _LAST = "!", "~"
_OTHER = ord(_LAST) - ord(_FIRST) + 2
LETTERS = _OTHER + 1
_POINTS = 72  # in an inch


@dataclass(frozen=True)
class Line:
    """A text as it was written.

    Attributes
    ----------
    size : tuple of int
        Width and height of the picture, in pixels.
    place : tuple of float
        Where its anchor lies, in pixels.
    text : str
    font : PIL.ImageFont.FreeTypeFont
    anchor : str
    """

    size: tuple[int, int]
    place: tuple[float, float]
    text: str
    font: ImageFont.FreeTypeFont
    anchor: str

    @property
    def span(self) -> tuple[float, float]:
        """Where its ink begins and ends from left to right, in pixels."""
        left, _, right, _ = self.font.getbbox(self.text, anchor=self.anchor)
        return self.place[0] + left, self.place[0] + right

    @property
    def middle(self) -> float:
        """How far down the middle of its ink is, in pixels."""
        _, top, _, bottom = self.font.getbbox(self.text, anchor=self.anchor)
        return self.place[1] + (top + bottom) / 2


@contextmanager
def recorded() -> Iterator[list[Line]]:
    """Lines that Pillow and matplotlib write meanwhile, in their order; of matplotlib's those that are level."""
    lines: list[Line] = []
    write, plot = ImageDraw.ImageDraw.text, RendererAgg.draw_text

    def written(self: ImageDraw.ImageDraw, xy: Any, text: str, *args: Any, **kwargs: Any) -> None:
        lines.append(Line(self.im.size, tuple(xy), text, kwargs["font"], kwargs.get("anchor") or "la"))
        write(self, xy, text, *args, **kwargs)

    def plotted(self: Any, gc: Any, x: float, y: float, text: str, prop: Any, angle: float, **kwargs: Any) -> None:
        if angle == 0:
            size = (round(self.width), round(self.height))
            font = _font(findfont(prop), prop.get_size_in_points() * self.dpi / _POINTS)
            lines.append(Line(size, (x, y), text, font, "ls"))
        plot(self, gc, x, y, text, prop, angle, **kwargs)

    ImageDraw.ImageDraw.text, RendererAgg.draw_text = written, plotted  # type: ignore[method-assign]
    try:
        yield lines
    finally:
        ImageDraw.ImageDraw.text, RendererAgg.draw_text = write, plot  # type: ignore[method-assign]


@lru_cache(maxsize=64)
def _font(path: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def pieces_shown(
    lines: Sequence[Line], size: tuple[int, int], tokenizer: PreTrainedTokenizerFast, most: int, rng: random.Random
) -> NDArray[np.int64]:
    """Some of the pieces of text on a picture, each with the visual token that its middle lies on.

    Parameters
    ----------
    lines : sequence of Line
        Those of a picture of another size are passed over.
    size : tuple of int
        Width and height of the picture, in pixels.
    tokenizer : PreTrainedTokenizerFast
    most : int
        Pieces at most; of more, any.
    rng : random.Random

    Returns
    -------
    numpy.ndarray
        Shape (pieces, 2): raster index of the visual token, id of the piece.
    """
    columns, rows = (side // TOKEN for side in size)
    found = []
    for line in lines:
        if line.size != size:
            continue
        (left, _), row = line.span, int(line.middle // TOKEN)
        encoded = tokenizer(line.text, add_special_tokens=False, return_offsets_mapping=True)
        for piece, (first, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            middle = (line.font.getlength(line.text[:first]) + line.font.getlength(line.text[:stop])) / 2
            column = int((left + middle) // TOKEN)
            if 0 <= row < rows and 0 <= column < columns:
                found.append((row * columns + column, piece))
    chosen = rng.sample(found, most) if len(found) > most else found
    return np.array(chosen, np.int64).reshape(-1, 2)


def letters_shown(lines: Sequence[Line], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Letter whose middle lies in each cell of a picture's visual tokens.

    Parameters
    ----------
    lines : sequence of Line
        Those of a picture of another size are passed over.
    size : tuple of int
        Width and height of the picture, in pixels.

    Returns
    -------
    numpy.ndarray
        Shape (visual tokens, ``CELLS``), in raster order: ``NO_LETTER``, the number of a letter below ``LETTERS``, or
        ``UNKNOWN``: where two letters share a cell, and everywhere on a picture without a line.
    """
    width, height = (side // TOKEN for side in size)
    cells = np.zeros((height * CELL_ROWS, width * CELL_COLUMNS), np.uint8)
    own = [line for line in lines if line.size == size]
    for line in own:
        row = int(line.middle * CELL_ROWS // TOKEN)
        if not 0 <= row < cells.shape[0]:
            continue
        left, right = line.span
        advances = np.array([line.font.getlength(letter) for letter in line.text])
        middles = left + (advances.cumsum() - advances / 2) * (right - left) / max(advances.sum(), 1.0)
        columns = (middles * CELL_COLUMNS // TOKEN).astype(int)
        for letter, column in zip(line.text, columns, strict=True):
            if letter.isspace() or not 0 <= column < cells.shape[1]:
                continue
            number = ord(letter) - ord(_FIRST) + 1 if _FIRST <= letter <= _LAST else _OTHER
            cells[row, column] = UNKNOWN if cells[row, column] else number
    if not own:
        cells[:] = UNKNOWN
    by_token = cells.reshape(height, CELL_ROWS, width, CELL_COLUMNS).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(by_token.reshape(-1, CELLS))
