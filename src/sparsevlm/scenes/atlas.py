"""Masks of all objects and digits, drawn once with Pillow and then only looked up."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .seeds import Draws
from .specification import N_OBJECT_SIZES, N_TEXT_SIZES
from .vocabulary import COLOUR_RGB, DARK_INK, FONTS, SHAPES

FULL = 128  # a mask value of 128 is opaque: (255 * 128) still fits into int16
SHAPE_SIDES = (56, 68, 80)
CARD_SIDES = ((90, 50), (97, 56), (104, 62))  # width, height
TEXT_SIZES = (30, 35, 40)
GLYPH_HEIGHT = 44
NOISE_SIDE = 512

_OVERSAMPLING = 4
_GLYPH_WIDTH = 28
_GLYPHS_PER_FONT_SIZE = 10


@dataclass(frozen=True)
class Atlas:
    """Lookup tables for rendering, all on one device.

    Attributes
    ----------
    objects : torch.Tensor
        int16 of shape (kinds + 1, sizes, cell, cell), values 0..FULL, centred; the last kind is the card.
    object_extent : torch.Tensor
        int64 of shape (kinds + 1, sizes, 2): height and width in pixels.
    glyphs : torch.Tensor
        int16 of shape (fonts, text sizes, 10, GLYPH_HEIGHT, width), values 0..FULL.
    advance : torch.Tensor
        int64 of shape (text sizes,): distance between digits.
    noise : torch.Tensor
        int16 of shape (3, NOISE_SIDE, NOISE_SIDE), values -64..63.
    colours : torch.Tensor
        int64 of shape (colours, 3).
    ink : torch.Tensor
        int64 of shape (colours, 1): grey level of the digits on a card of that colour.
    """

    objects: torch.Tensor
    object_extent: torch.Tensor
    glyphs: torch.Tensor
    advance: torch.Tensor
    noise: torch.Tensor
    colours: torch.Tensor
    ink: torch.Tensor


@lru_cache(maxsize=8)
def atlas_for(cell: int, device: str) -> Atlas:
    """The atlas for a cell side in pixels, built once per device."""
    masks, extents = _object_masks(cell)
    return Atlas(
        objects=masks.to(device),
        object_extent=extents.to(device),
        glyphs=_glyph_masks().to(device),
        advance=torch.tensor([_advance(size) for size in TEXT_SIZES], device=device),
        noise=_noise_tile().to(device),
        colours=torch.tensor(COLOUR_RGB, device=device),
        ink=torch.tensor([[25] if dark else [240] for dark in DARK_INK], device=device),
    )


def _advance(text_size: int) -> int:
    return round(0.66 * text_size)


def _to_mask(image: Image.Image) -> torch.Tensor:
    """8-bit greyscale to int16 in 0..FULL."""
    return (torch.from_numpy(np.asarray(image, dtype=np.int16).copy()) * FULL + 127) // 255


def _object_masks(cell: int) -> tuple[torch.Tensor, torch.Tensor]:
    if max(SHAPE_SIDES) + 4 > cell or max(CARD_SIDES[-1]) + 4 > cell:
        raise ValueError(f"cells of {cell} pixels are too small for objects of up to {CARD_SIDES[-1][0]} pixels")
    kinds = [[(side, side) for side in SHAPE_SIDES] for _ in SHAPES] + [list(CARD_SIDES)]
    masks = torch.zeros(len(kinds), N_OBJECT_SIZES, cell, cell, dtype=torch.int16)
    extents = torch.zeros(len(kinds), N_OBJECT_SIZES, 2, dtype=torch.int64)
    for kind, sides in enumerate(kinds):
        for size, (width, height) in enumerate(sides):
            big = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING), 0)
            _draw_object(ImageDraw.Draw(big), kind, *big.size)
            top, left = (cell - height) // 2, (cell - width) // 2
            small = _to_mask(big.resize((width, height), Image.Resampling.BOX))
            masks[kind, size, top : top + height, left : left + width] = small
            extents[kind, size] = torch.tensor([height, width])
    return masks, extents


def _draw_object(draw: ImageDraw.ImageDraw, kind: int, width: int, height: int) -> None:
    """Fill the canvas with shape number ``kind``, or with a card if there is no such shape."""
    right, bottom, band = width - 1, height - 1, width // 5
    if kind >= len(SHAPES):
        draw.rounded_rectangle((0, 0, right, bottom), radius=height // 7, fill=255)
        return
    shape = SHAPES[kind]
    if shape == "square":
        inset = width // 12
        draw.rectangle((inset, inset, right - inset, bottom - inset), fill=255)
    elif shape in ("circle", "ring"):
        draw.ellipse((0, 0, right, bottom), fill=255)
        if shape == "ring":
            draw.ellipse((band, band, right - band, bottom - band), fill=0)
    elif shape == "cross":
        near, far = width // 2 - band // 2 - band // 4, width // 2 + band // 2 + band // 4
        draw.rectangle((near, 0, far, bottom), fill=255)
        draw.rectangle((0, near, right, far), fill=255)
    else:
        draw.polygon([(x * right, y * bottom) for x, y in _outline(shape)], fill=255)


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
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    glyphs = torch.zeros(len(FONTS), N_TEXT_SIZES, _GLYPHS_PER_FONT_SIZE, GLYPH_HEIGHT, _GLYPH_WIDTH, dtype=torch.int16)
    for font_id, name in enumerate(FONTS):
        for size_id, size in enumerate(TEXT_SIZES):
            # Basic layout: the same glyph placement whether or not Pillow was built with Raqm.
            font = ImageFont.truetype(str(folder / name), size, layout_engine=ImageFont.Layout.BASIC)
            for digit in range(_GLYPHS_PER_FONT_SIZE):
                canvas = Image.new("L", (_GLYPH_WIDTH, GLYPH_HEIGHT), 0)
                left, top, right, bottom = font.getbbox(str(digit))
                x, y = (_advance(size) - (right - left)) // 2 - left, (GLYPH_HEIGHT - (bottom - top)) // 2 - top
                ImageDraw.Draw(canvas).text((x, y), str(digit), font=font, fill=255)
                glyphs[font_id, size_id, digit] = _to_mask(canvas)
    return glyphs


def _noise_tile() -> torch.Tensor:
    """Triangular noise of three channels, the same everywhere."""
    bits = Draws(torch.zeros(1, dtype=torch.int64)).bits("noise tile", 3, NOISE_SIDE, NOISE_SIDE)[0]
    return (((bits & 63) + ((bits >> 6) & 63)) - 63).to(torch.int16)
