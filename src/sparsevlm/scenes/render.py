"""Batched drawing of scenes: integer arithmetic only, so every device gives the same pixels."""

from dataclasses import dataclass

import torch

from .atlas import CARD_LENGTHS, FIRST_CARD, FIRST_CLUTTER, FULL, GLYPH_HEIGHT, NOISE_SIDE, Atlas, atlas_for
from .specification import N_SHAPE_SIZES, NOTHING, SceneSpec
from .vocabulary import MAX_GLYPHS, NO_PIECE, SHAPES

CARD, CLUTTER = len(SHAPES), len(SHAPES) + 1  # kinds after those of the shapes


@dataclass(frozen=True)
class Ground:
    """What scenes are drawn on, and how faintly.

    Attributes
    ----------
    pixels : torch.Tensor or None
        uint8 of shape (batch, 3, height, width) on the device of the scenes; ``None``: their own plain ground.
    opacity : int
        Of everything that stands on it, from 0 to ``FULL``.
    """

    pixels: torch.Tensor | None = None
    opacity: int = FULL


PLAIN = Ground()


def render(spec: SceneSpec, ground: Ground = PLAIN) -> torch.Tensor:
    """Draw the scenes.

    Parameters
    ----------
    spec : SceneSpec
    ground : Ground

    Returns
    -------
    torch.Tensor
        uint8 of shape (batch, 3, height, width) on the device of ``spec``.
    """
    layout, atlas = spec.layout, _atlas(spec)
    kinds, colours = cell_contents(spec)
    tiles = cell_tiles(spec, kinds)
    boxes = object_boxes(spec, tiles)
    cover = _tile_pixels(spec, atlas, tiles, boxes)
    text = _text_pixels(spec, atlas, boxes)
    is_clutter = (kinds == CLUTTER)[..., None]
    paint = torch.where(is_clutter, spec.clutter_grey, atlas.colours[colours]) + spec.colour_jitter
    inside, at, cell = _grid_pixels(spec)
    below = _background(spec) if ground.pixels is None else ground.pixels.to(torch.int16)
    canvas = below
    for mask, colour in ((cover, paint), (text, atlas.ink[colours].expand_as(paint))):
        alpha = (mask.flatten(1).gather(1, at) * inside).view(-1, 1, layout.height, layout.width)
        target = colour.clamp(0, 255).to(torch.int16).transpose(1, 2).gather(2, cell[:, None].expand(-1, 3, -1))
        canvas = canvas + (((target.view_as(canvas) - canvas) * alpha) >> 7)
    if ground.opacity < FULL:
        canvas = below + (((canvas - below) * ground.opacity) >> 7)
    return (canvas + _noise(spec, atlas)).clamp(0, 255).to(torch.uint8)


def _grid_pixels(spec: SceneSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coordinates of each pixel of the image in the grid.

    Returns
    -------
    tuple of torch.Tensor
        Each of shape (batch, height * width): bool, whether it lies in the grid; int64, its index into the pixels of
        all cells one after the other; int64, its cell.
    """
    layout = spec.layout
    y = torch.arange(layout.height, device=spec.device) - spec.grid_shift[:, :1]
    x = torch.arange(layout.width, device=spec.device) - spec.grid_shift[:, 1:]
    inside_y, inside_x = (y >= 0) & (y < layout.rows * layout.cell), (x >= 0) & (x < layout.cols * layout.cell)
    y, x = y.clamp(0, layout.rows * layout.cell - 1), x.clamp(0, layout.cols * layout.cell - 1)
    cell = (y // layout.cell * layout.cols)[:, :, None] + (x // layout.cell)[:, None, :]
    pixel = (y % layout.cell * layout.cell)[:, :, None] + (x % layout.cell)[:, None, :]
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    return inside.flatten(1), (cell * layout.cell**2 + pixel).flatten(1), cell.flatten(1)


def _atlas(spec: SceneSpec) -> Atlas:
    return atlas_for(spec.layout.cell, str(spec.device))


def cell_contents(spec: SceneSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Object kind and colour of every cell.

    Returns
    -------
    tuple of torch.Tensor
        int64 of shape (batch, cells) each. Kind is an index into ``SHAPES``, ``CARD``, ``CLUTTER``, or -1 for an empty
        cell; the colour of cells without shape or card is 0.
    """
    kinds = torch.where(spec.cell_clutter == NOTHING, NOTHING, CLUTTER)
    colours = torch.zeros_like(kinds)
    free = kinds.gather(1, spec.shape_cells)
    kinds.scatter_(1, spec.shape_cells, torch.where(spec.shape_valid, spec.shape_kinds, free))
    colours.scatter_(1, spec.shape_cells, spec.shape_colours.masked_fill(~spec.shape_valid, 0))
    kinds.scatter_(1, spec.card_cells, torch.full_like(spec.card_cells, CARD))
    colours.scatter_(1, spec.card_cells, spec.card_colours)
    return kinds, colours


def cell_tiles(spec: SceneSpec, kinds: torch.Tensor) -> torch.Tensor:
    """Tile of the atlas that each cell shows, -1 for none; int64 of shape (batch, cells) like ``kinds``."""
    tiles = torch.where(kinds == CLUTTER, FIRST_CLUTTER + spec.cell_clutter, NOTHING)
    is_shape = (kinds >= 0) & (kinds < CARD)
    tiles = torch.where(is_shape, kinds * N_SHAPE_SIZES + spec.cell_sizes, tiles)
    length = (spec.card_glyphs != NO_PIECE).sum(dim=-1)
    cards = FIRST_CARD + spec.card_text_sizes * len(CARD_LENGTHS) + length - CARD_LENGTHS.start
    return tiles.scatter(1, spec.card_cells, cards)


def object_boxes(spec: SceneSpec, tiles: torch.Tensor) -> torch.Tensor:
    """Object boxes inside their cells.

    Parameters
    ----------
    tiles : torch.Tensor
        From :func:`cell_tiles`; boxes of empty cells mean nothing.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, cells, 4): top, left, height, width in pixels from the cell's corner.
    """
    extent = _atlas(spec).extent[tiles.clamp(min=0)]
    room = (spec.layout.cell - extent) // 2 - 2
    corner = (spec.layout.cell - extent) // 2 + _jitter(spec.cell_shift, room)
    return torch.cat([corner, extent], dim=-1)


def picture_boxes(spec: SceneSpec) -> torch.Tensor:
    """Object boxes in the picture, int64 of shape (batch, cells, 4): left, top, right, bottom in pixels."""
    kinds, _ = cell_contents(spec)
    boxes = object_boxes(spec, cell_tiles(spec, kinds))
    top, left = (boxes[..., :2] + cell_corners(spec)).unbind(-1)
    return torch.stack([left, top, left + boxes[..., 3], top + boxes[..., 2]], dim=-1)


def cell_corners(spec: SceneSpec) -> torch.Tensor:
    """Upper left corner of each cell in the picture, int64 of shape (batch, cells, 2): y and x in pixels."""
    cell = torch.arange(spec.layout.n_cells, device=spec.device)
    corner = torch.stack([cell // spec.layout.cols, cell % spec.layout.cols], dim=-1) * spec.layout.cell
    return corner + spec.grid_shift[:, None]


def _jitter(bits: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Uniform integers in [-room, room] from 32-bit draws."""
    return (bits * (2 * room + 1) >> 32) - room


def _tile_pixels(spec: SceneSpec, atlas: Atlas, tiles: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Coverage by the cell's object, int16 of shape (batch, cells, cell, cell)."""
    cell = spec.layout.cell
    shift = boxes[..., :2] - (cell - boxes[..., 2:]) // 2
    pixel = torch.arange(cell, device=tiles.device)
    rows = (pixel - shift[..., :1]).clamp(0, cell - 1)  # the border of an atlas tile is always empty
    cols = (pixel - shift[..., 1:]).clamp(0, cell - 1)
    index = ((tiles.clamp(min=0)[..., None] * cell + rows) * cell)[..., :, None] + cols[..., None, :]
    return atlas.tiles.flatten()[index] * (tiles >= 0)[..., None, None]


def glyph_centres(spec: SceneSpec, boxes: torch.Tensor) -> torch.Tensor:
    """Centres of the cards' glyphs inside their cells.

    Parameters
    ----------
    boxes : torch.Tensor
        From :func:`object_boxes`.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, N_CARDS, MAX_GLYPHS, 2): y and x in pixels from the cell's corner; for a place without
        a glyph, where it would be.
    """
    corner, advance = _text_corners(spec, _atlas(spec), boxes)
    x = corner[..., 1:] + advance[..., None] * torch.arange(MAX_GLYPHS, device=corner.device) + advance[..., None] // 2
    y = (corner[..., :1] + GLYPH_HEIGHT // 2).expand_as(x)
    return torch.stack([y, x], dim=-1)


def _text_corners(spec: SceneSpec, atlas: Atlas, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top left corner (batch, N_CARDS, 2) of each card's text in its cell; distance of glyphs (batch, N_CARDS)."""
    box = boxes.gather(1, spec.card_cells[..., None].expand(-1, -1, 4))
    advance = atlas.advance[spec.card_text_sizes]
    length = (spec.card_glyphs != NO_PIECE).sum(dim=-1)
    size = torch.stack([torch.full_like(advance, GLYPH_HEIGHT), length * advance], dim=-1)
    slack = box[..., 2:] - size
    return box[..., :2] + slack // 2 + _jitter(spec.text_shift, (slack // 2 - 3).clamp(min=0)), advance


def _text_pixels(spec: SceneSpec, atlas: Atlas, boxes: torch.Tensor) -> torch.Tensor:
    """Coverage by text, int16 of shape (batch, cells, cell, cell)."""
    cell = spec.layout.cell
    corner, advance = _text_corners(spec, atlas, boxes)
    pixel = torch.arange(cell, device=boxes.device)
    y, x = pixel - corner[..., :1], pixel - corner[..., 1:]
    slot = torch.div(x, advance[..., None], rounding_mode="floor")
    glyph = spec.card_glyphs.gather(2, slot.clamp(0, MAX_GLYPHS - 1))
    inside_y = (y >= 0) & (y < GLYPH_HEIGHT)
    inside_x = (slot >= 0) & (slot < MAX_GLYPHS) & (glyph != NO_PIECE)
    _, n_sizes, n_glyphs, height, width = atlas.glyphs.shape
    glyph = (spec.card_fonts * n_sizes + spec.card_text_sizes)[..., None] * n_glyphs + glyph
    index = (glyph * height * width + x - slot * advance[..., None])[..., None, :]
    index = index + y.clamp(0, height - 1)[..., :, None] * width
    index = index * inside_x[..., None, :]  # columns off the text read a pixel that is masked out below
    coverage = atlas.glyphs.flatten()[index] * (inside_y[..., :, None] & inside_x[..., None, :])

    out = torch.zeros(*spec.cell_sizes.shape, cell, cell, dtype=torch.int16, device=boxes.device)
    return out.scatter_(1, spec.card_cells[..., None, None].expand_as(coverage), coverage)


def _background(spec: SceneSpec) -> torch.Tensor:
    """Linear colour gradient, int16 of shape (batch, 3, height, width)."""
    height, width, device = spec.layout.height, spec.layout.width, spec.device
    along_y = spec.slope_y[..., None] * (torch.arange(height, device=device) * 2 - height) // (2 * height)
    along_x = spec.slope_x[..., None] * (torch.arange(width, device=device) * 2 - width) // (2 * width)
    rows = (spec.base[..., None] + along_y).to(torch.int16)
    return rows[..., :, None] + along_x.to(torch.int16)[..., None, :]


def _noise(spec: SceneSpec, atlas: Atlas) -> torch.Tensor:
    """Pixel noise cut from the tile at the scene's offset, int16 of shape (batch, 3, height, width)."""
    device = spec.device
    rows = (torch.arange(spec.layout.height, device=device) + spec.noise_offset[:, :1]) % NOISE_SIDE
    cols = (torch.arange(spec.layout.width, device=device) + spec.noise_offset[:, 1:]) % NOISE_SIDE
    tile = atlas.noise[:, rows[:, :, None], cols[:, None, :]].transpose(0, 1)
    return (tile * spec.noise_level[:, None, None, None].to(torch.int16)) >> 6


assert FULL == 1 << 7, "the blend shifts by seven bits"
