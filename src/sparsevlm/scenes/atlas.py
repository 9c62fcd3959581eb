"""Masks of all objects and digits, drawn once with Pillow and then only looked up."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .seeds import Draws
from .specification import N_CLUTTER, N_SHAPE_SIZES, N_TEXT_SIZES
from .vocabulary import COLOUR_RGB, DARK_INK, FONTS, GLYPHS, MAX_GLYPHS, N_DIGITS, SHAPES

FULL = 128  # a mask value of 128 is opaque: (255 * 128) still fits into int16
SHAPE_SIDES = (36, 54, 74)
TEXT_SIZES = (20, 24, 28, 34)  # digits of 15, 18, 21 and 25 pixels
GLYPH_HEIGHT = 44
NOISE_SIDE = 512

# Tiles: shapes by kind and size, cards by text size and length, clutter.
CARD_LENGTHS = range(N_DIGITS, MAX_GLYPHS + 1)
FIRST_CARD = len(SHAPES) * N_SHAPE_SIZES
FIRST_CLUTTER = FIRST_CARD + N_TEXT_SIZES * len(CARD_LENGTHS)
N_TILES = FIRST_CLUTTER + N_CLUTTER

_OVERSAMPLING = 4
_GLYPH_WIDTH = 32
_MARGIN = 4
_CLUTTER_SIDES = (60, 78, 96)
_STROKES = 6


@dataclass(frozen=True)
class Atlas:
    """Lookup tables for rendering, all on one device.

    Attributes
    ----------
    tiles : torch.Tensor
        int16 of shape (N_TILES, cell, cell), values 0..FULL, centred.
    extent : torch.Tensor
        int64 of shape (N_TILES, 2): height and width in pixels.
    glyphs : torch.Tensor
        int16 of shape (fonts, text sizes, glyphs, GLYPH_HEIGHT, width), values 0..FULL.
    advance : torch.Tensor
        int64 of shape (text sizes,): distance between glyphs.
    noise : torch.Tensor
        int16 of shape (3, NOISE_SIDE, NOISE_SIDE), values -64..63.
    colours : torch.Tensor
        int64 of shape (colours, 3).
    ink : torch.Tensor
        int64 of shape (colours, 1): grey level of the text on a card of that colour.
    """

    tiles: torch.Tensor
    extent: torch.Tensor
    glyphs: torch.Tensor
    advance: torch.Tensor
    noise: torch.Tensor
    colours: torch.Tensor
    ink: torch.Tensor


@lru_cache(maxsize=8)
def atlas_for(cell: int, device: str) -> Atlas:
    """The atlas for a cell side in pixels, built once per device."""
    tiles, extent = _tiles(cell)
    return Atlas(
        tiles=tiles.to(device),
        extent=extent.to(device),
        glyphs=_glyph_masks().to(device),
        advance=torch.tensor([_advance(size) for size in TEXT_SIZES], device=device),
        noise=_noise_tile().to(device),
        colours=torch.tensor(COLOUR_RGB, device=device),
        ink=torch.tensor([[25] if dark else [240] for dark in DARK_INK], device=device),
    )


def _advance(text_size: int) -> int:
    return round(0.74 * text_size)


def _to_mask(image: Image.Image) -> torch.Tensor:
    """8-bit greyscale to int16 in 0..FULL."""
    return (torch.from_numpy(np.asarray(image, dtype=np.int16).copy()) * FULL + 127) // 255


def _tiles(cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = [(side, side) for _ in SHAPES for side in SHAPE_SIDES]
    sizes += [
        (min(length * _advance(size) + size // 2, cell - _MARGIN), round(1.3 * size) + 8)
        for size in TEXT_SIZES
        for length in CARD_LENGTHS
    ]
    sizes += [(_CLUTTER_SIDES[kind % len(_CLUTTER_SIDES)],) * 2 for kind in range(N_CLUTTER)]
    if max(map(max, sizes)) + _MARGIN > cell:
        raise ValueError(f"cells of {cell} pixels are too small for objects of up to {max(map(max, sizes))} pixels")
    tiles = torch.zeros(N_TILES, cell, cell, dtype=torch.int16)
    for tile, (width, height) in enumerate(sizes):
        big = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING), 0)
        _draw_tile(ImageDraw.Draw(big), tile, *big.size)
        top, left = (cell - height) // 2, (cell - width) // 2
        small = _to_mask(big.resize((width, height), Image.Resampling.BOX))
        tiles[tile, top : top + height, left : left + width] = small
    return tiles, torch.tensor([(height, width) for width, height in sizes])


def _draw_tile(draw: ImageDraw.ImageDraw, tile: int, width: int, height: int) -> None:
    """Fill the canvas with what tile number ``tile`` shows."""
    if tile >= FIRST_CLUTTER:
        _draw_clutter(draw, tile - FIRST_CLUTTER, width)
    elif tile >= FIRST_CARD:
        draw.rounded_rectangle((0, 0, width - 1, height - 1), radius=height // 7, fill=255)
    else:
        _draw_shape(draw, SHAPES[tile // N_SHAPE_SIZES], width)


def _draw_clutter(draw: ImageDraw.ImageDraw, kind: int, side: int) -> None:
    """Strokes that mean nothing: lines, arcs or dots, different for every kind."""
    draws = Draws(torch.tensor([kind]))
    points = (draws.bits("clutter points", _STROKES, 4)[0] * side >> 32).tolist()
    thick = side // 24
    for x0, y0, x1, y1 in points:
        if kind % 3 == 0:
            draw.line((x0, y0, x1, y1), fill=255, width=thick)
        elif kind % 3 == 1:
            box = (min(x0, x1), min(y0, y1), max(x0, x1) + thick, max(y0, y1) + thick)
            draw.arc(box, start=x0 % 360, end=x0 % 360 + 200, fill=255, width=thick)
        else:
            draw.ellipse((x0 - thick, y0 - thick, x0 + thick, y0 + thick), fill=255)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, side: int) -> None:
    last, band = side - 1, side // 5
    if shape == "square":
        inset = side // 12
        draw.rectangle((inset, inset, last - inset, last - inset), fill=255)
    elif shape in ("circle", "ring"):
        draw.ellipse((0, 0, last, last), fill=255)
        if shape == "ring":
            draw.ellipse((band, band, last - band, last - band), fill=0)
    elif shape == "cross":
        near, far = side // 2 - band // 2 - band // 4, side // 2 + band // 2 + band // 4
        draw.rectangle((near, 0, far, last), fill=255)
        draw.rectangle((0, near, last, far), fill=255)
    else:
        draw.polygon([(x * last, y * last) for x, y in _outline(shape)], fill=255)


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corner points in the unit square."""
    if shape == "triangle":
        return [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)]
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 0.52, 0.21)
        return [(0.5 + r * np.sin(a), 0.53 - r * np.cos(a)) for a, r in zip(angles, radii, strict=True)]
    t = np.linspace(0, 2 * np.pi, 90)
    x, y = np.sin(t) ** 3, (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 17
    return [(0.5 + 0.49 * a, 0.44 - 0.49 * b) for a, b in zip(x, y, strict=True)]


def _glyph_masks() -> torch.Tensor:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the letters of the drawn scenes are those of matplotlib, which the extra cli brings: run "
            '`pip install ".[cli]"` in the source tree, or `pip install matplotlib`.'
        ) from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    glyphs = torch.zeros(len(FONTS), N_TEXT_SIZES, len(GLYPHS), GLYPH_HEIGHT, _GLYPH_WIDTH, dtype=torch.int16)
    for font_id, name in enumerate(FONTS):
        for size_id, size in enumerate(TEXT_SIZES):
            # Basic layout: the same glyph placement whether or not Pillow was built with Raqm.
            font = ImageFont.truetype(str(folder / name), size, layout_engine=ImageFont.Layout.BASIC)
            for glyph_id, glyph in enumerate(GLYPHS):
                canvas = Image.new("L", (_GLYPH_WIDTH, GLYPH_HEIGHT), 0)
                left, top, right, bottom = font.getbbox(glyph)
                x, y = (_advance(size) - (right - left)) // 2 - left, (GLYPH_HEIGHT - (bottom - top)) // 2 - top
                ImageDraw.Draw(canvas).text((x, y), glyph, font=font, fill=255)
                glyphs[font_id, size_id, glyph_id] = _to_mask(canvas)
    return glyphs


def _noise_tile() -> torch.Tensor:
    """Triangular noise of three channels, the same everywhere."""
    bits = Draws(torch.zeros(1, dtype=torch.int64)).bits("noise tile", 3, NOISE_SIDE, NOISE_SIDE)[0]
    return (((bits & 63) + ((bits >> 6) & 63)) - 63).to(torch.int16)
