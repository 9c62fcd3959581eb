"""Batched drawing of scenes: integer arithmetic only, so every device gives the same pixels."""

import torch

from .atlas import FULL, GLYPH_HEIGHT, NOISE_SIDE, Atlas, atlas_for
from .specification import SceneSpec
from .vocabulary import N_DIGITS, SHAPES

_CARD = len(SHAPES)


def render(spec: SceneSpec) -> torch.Tensor:
    """Draw the scenes.

    Returns
    -------
    torch.Tensor
        uint8 of shape (batch, 3, height, width) on the device of ``spec``.
    """
    layout, atlas = spec.layout, atlas_for(spec.layout.cell, str(spec.seeds.device))
    kinds, colours = cell_contents(spec)
    boxes = object_boxes(spec, kinds)
    masks = _object_pixels(spec, atlas, kinds, boxes)
    text = _text_pixels(spec, atlas, boxes)
    paint = atlas.colours[colours] + spec.colour_jitter
    grid = (layout.rows, layout.cols)

    canvas = _background(spec).unflatten(3, (layout.cols, layout.cell)).unflatten(2, (layout.rows, layout.cell))
    for mask, colour in ((masks, paint), (text, atlas.ink[colours].expand_as(paint))):
        cover = mask.unflatten(1, grid).permute(0, 1, 3, 2, 4)[:, None]
        target = colour.clamp(0, 255).to(torch.int16).unflatten(1, grid).permute(0, 3, 1, 2)[:, :, :, None, :, None]
        canvas = canvas + (((target - canvas) * cover) >> 7)
    return (canvas.flatten(4, 5).flatten(2, 3) + _noise(spec, atlas)).clamp(0, 255).to(torch.uint8)


def cell_contents(spec: SceneSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Object kind and colour of every cell.

    Returns
    -------
    tuple of torch.Tensor
        int64 of shape (batch, cells) each. Kind is an index into ``SHAPES``, ``len(SHAPES)`` for a card and -1 for an
        empty cell, whose colour is 0.
    """
    batch, cells = spec.seeds.shape[0], spec.layout.n_cells
    kinds = torch.full((batch, cells), -1, dtype=torch.int64, device=spec.seeds.device)
    colours = torch.zeros_like(kinds)
    kinds.scatter_(1, spec.shape_cells, spec.shape_kinds.masked_fill(~spec.shape_valid, -1))
    colours.scatter_(1, spec.shape_cells, spec.shape_colours.masked_fill(~spec.shape_valid, 0))
    kinds.scatter_(1, spec.card_cells, torch.full_like(spec.card_cells, _CARD))
    colours.scatter_(1, spec.card_cells, spec.card_colours)
    return kinds, colours


def object_boxes(spec: SceneSpec, kinds: torch.Tensor) -> torch.Tensor:
    """Object boxes inside their cells.

    Parameters
    ----------
    kinds : torch.Tensor
        int64 of shape (batch, cells), see :func:`cell_contents`; boxes of empty cells mean nothing.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, cells, 4): top, left, height, width in pixels from the cell's corner.
    """
    atlas = atlas_for(spec.layout.cell, str(spec.seeds.device))
    extent = atlas.object_extent[kinds.clamp(min=0), spec.cell_sizes]
    room = (spec.layout.cell - extent) // 2 - 2
    corner = (spec.layout.cell - extent) // 2 + _jitter(spec.cell_shift, room)
    return torch.cat([corner, extent], dim=-1)


def _jitter(bits: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
    """Uniform integers in [-room, room] from 32-bit draws."""
    return (bits * (2 * room + 1) >> 32) - room


def _object_pixels(spec: SceneSpec, atlas: Atlas, kinds: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Coverage by the cell's object, int16 of shape (batch, cells, cell, cell)."""
    cell = spec.layout.cell
    shift = boxes[..., :2] - (cell - boxes[..., 2:]) // 2
    pixel = torch.arange(cell, device=kinds.device)
    rows = (pixel - shift[..., :1]).clamp(0, cell - 1)  # the border of an atlas tile is always empty
    cols = (pixel - shift[..., 1:]).clamp(0, cell - 1)
    tile = kinds.clamp(min=0) * atlas.objects.shape[1] + spec.cell_sizes
    index = ((tile[..., None] * cell + rows) * cell)[..., :, None] + cols[..., None, :]
    return atlas.objects.flatten()[index] * (kinds >= 0)[..., None, None]


def digit_centres(spec: SceneSpec, boxes: torch.Tensor) -> torch.Tensor:
    """Centres of the cards' digits inside their cells.

    Parameters
    ----------
    boxes : torch.Tensor
        From :func:`object_boxes`.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, N_CARDS, N_DIGITS, 2): y and x in pixels from the cell's corner.
    """
    corner, advance = _text_corners(spec, atlas_for(spec.layout.cell, str(spec.seeds.device)), boxes)
    x = corner[..., 1:] + advance[..., None] * torch.arange(N_DIGITS, device=corner.device) + advance[..., None] // 2
    y = (corner[..., :1] + GLYPH_HEIGHT // 2).expand_as(x)
    return torch.stack([y, x], dim=-1)


def _text_corners(spec: SceneSpec, atlas: Atlas, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Top left corner (batch, N_CARDS, 2) of each card's text in its cell; distance of digits (batch, N_CARDS)."""
    box = boxes.gather(1, spec.card_cells[..., None].expand(-1, -1, 4))
    advance = atlas.advance[spec.card_text_sizes]
    size = torch.stack([torch.full_like(advance, GLYPH_HEIGHT), N_DIGITS * advance], dim=-1)
    slack = box[..., 2:] - size
    return box[..., :2] + slack // 2 + _jitter(spec.text_shift, (slack // 2 - 3).clamp(min=0)), advance


def _text_pixels(spec: SceneSpec, atlas: Atlas, boxes: torch.Tensor) -> torch.Tensor:
    """Coverage by digits, int16 of shape (batch, cells, cell, cell)."""
    cell = spec.layout.cell
    corner, advance = _text_corners(spec, atlas, boxes)
    pixel = torch.arange(cell, device=boxes.device)
    y, x = pixel - corner[..., :1], pixel - corner[..., 1:]
    slot = torch.div(x, advance[..., None], rounding_mode="floor")
    inside_y, inside_x = (y >= 0) & (y < GLYPH_HEIGHT), (slot >= 0) & (slot < N_DIGITS)
    digit = spec.card_digits.gather(2, slot.clamp(0, N_DIGITS - 1))
    glyph = (spec.card_fonts * atlas.glyphs.shape[1] + spec.card_text_sizes)[..., None] * 10 + digit
    _, _, _, height, width = atlas.glyphs.shape
    index = (glyph * height * width + x - slot * advance[..., None])[..., None, :]
    index = index + y.clamp(0, height - 1)[..., :, None] * width
    index = index * inside_x[..., None, :]  # columns off the text read a pixel that is masked out below
    coverage = atlas.glyphs.flatten()[index] * (inside_y[..., :, None] & inside_x[..., None, :])

    out = torch.zeros(*spec.cell_sizes.shape, cell, cell, dtype=torch.int16, device=boxes.device)
    return out.scatter_(1, spec.card_cells[..., None, None].expand_as(coverage), coverage)


def _background(spec: SceneSpec) -> torch.Tensor:
    """Linear colour gradient, int16 of shape (batch, 3, height, width)."""
    height, width, device = spec.layout.height, spec.layout.width, spec.seeds.device
    along_y = spec.slope_y[..., None] * (torch.arange(height, device=device) * 2 - height) // (2 * height)
    along_x = spec.slope_x[..., None] * (torch.arange(width, device=device) * 2 - width) // (2 * width)
    rows = (spec.base[..., None] + along_y).to(torch.int16)
    return rows[..., :, None] + along_x.to(torch.int16)[..., None, :]


def _noise(spec: SceneSpec, atlas: Atlas) -> torch.Tensor:
    """Pixel noise cut from the tile at the scene's offset, int16 of shape (batch, 3, height, width)."""
    device = spec.seeds.device
    rows = (torch.arange(spec.layout.height, device=device) + spec.noise_offset[:, :1]) % NOISE_SIDE
    cols = (torch.arange(spec.layout.width, device=device) + spec.noise_offset[:, 1:]) % NOISE_SIDE
    tile = atlas.noise[:, rows[:, :, None], cols[:, None, :]].transpose(0, 1)
    return (tile * spec.noise_level[:, None, None, None].to(torch.int16)) >> 6


assert FULL == 1 << 7, "the blend shifts by seven bits"
