"""What each scene of a batch contains, sampled from its seed."""

from dataclasses import dataclass

import torch

from .seeds import Draws
from .vocabulary import (
    COLOURS,
    DEFAULT_LAYOUT,
    FONTS,
    MAX_SHAPES,
    MIN_SHAPES,
    N_CARDS,
    N_DIGITS,
    SHAPES,
    Layout,
)

N_OBJECT_SIZES = 3
N_TEXT_SIZES = 3

_COLOUR_JITTER = 14
_BASE_RANGE = (55, 160)
_TINT = 18
_SLOPE = 45


@dataclass(frozen=True)
class SceneSpec:
    """A batch of scene descriptions; all tensors are int64 unless said otherwise.

    Attributes
    ----------
    layout : Layout
        The grid, common to the batch.
    seeds : torch.Tensor
        Shape (batch,).
    card_cells, card_colours, card_fonts, card_text_sizes : torch.Tensor
        Shape (batch, N_CARDS): cell index, colour index, font index, text size index.
    card_digits : torch.Tensor
        Shape (batch, N_CARDS, N_DIGITS), most significant first; the first digit is never 0.
    shape_cells, shape_colours, shape_kinds : torch.Tensor
        Shape (batch, MAX_SHAPES); only slots with ``shape_valid`` are drawn.
    repeated_colour : torch.Tensor
        Shape (batch,): the shape colour that may occur up to MAX_SHAPES times.
    shape_valid : torch.Tensor
        bool of shape (batch, MAX_SHAPES). Slot 0 is valid and its kind is unlike all others of its scene.
    cell_sizes : torch.Tensor
        Shape (batch, cells): object size index.
    cell_shift, text_shift : torch.Tensor
        Shape (batch, cells, 2) and (batch, N_CARDS, 2): 32-bit draws for the (y, x) jitter, scaled by the
        room that is left when the object's size is known.
    colour_jitter : torch.Tensor
        Shape (batch, cells, 3): added to the object's RGB.
    base, slope_y, slope_x : torch.Tensor
        Shape (batch, 3): background RGB and its change over the whole height and width.
    noise_offset : torch.Tensor
        Shape (batch, 2): where the noise tile starts.
    noise_level : torch.Tensor
        Shape (batch,): noise amplitude in grey levels.
    """

    layout: Layout
    seeds: torch.Tensor
    card_cells: torch.Tensor
    card_colours: torch.Tensor
    card_fonts: torch.Tensor
    card_text_sizes: torch.Tensor
    card_digits: torch.Tensor
    shape_cells: torch.Tensor
    shape_colours: torch.Tensor
    shape_kinds: torch.Tensor
    shape_valid: torch.Tensor
    repeated_colour: torch.Tensor
    cell_sizes: torch.Tensor
    cell_shift: torch.Tensor
    text_shift: torch.Tensor
    colour_jitter: torch.Tensor
    base: torch.Tensor
    slope_y: torch.Tensor
    slope_x: torch.Tensor
    noise_offset: torch.Tensor
    noise_level: torch.Tensor


def sample_specs(seeds: torch.Tensor, layout: Layout = DEFAULT_LAYOUT) -> SceneSpec:
    """Sample the scenes of the given seeds on the seeds' device.

    Parameters
    ----------
    seeds : torch.Tensor
        int64 of shape (batch,).
    layout : Layout
        Grid to place the objects on; needs at least ``N_CARDS + MAX_SHAPES`` cells.

    Raises
    ------
    ValueError
        If the layout has too few cells.
    """
    if layout.n_cells < N_CARDS + MAX_SHAPES:
        raise ValueError(f"a layout needs at least {N_CARDS + MAX_SHAPES} cells, got {layout.rows}x{layout.cols}")
    draws, cells = Draws(seeds), layout.n_cells
    places = draws.permutation("cells", cells)
    digits = draws.integers("digits", 0, 10, N_CARDS, N_DIGITS)
    digits[:, :, 0] = draws.integers("first digit", 1, 10, N_CARDS)
    repeated = draws.integers("repeated colour", 0, len(COLOURS), 1)
    shape_colours, shape_valid = _sample_shape_colours(draws, repeated)
    level = draws.integers("base", *_BASE_RANGE, 1)
    return SceneSpec(
        layout=layout,
        seeds=seeds,
        card_cells=places[:, :N_CARDS],
        card_colours=draws.permutation("card colours", len(COLOURS))[:, :N_CARDS],
        card_fonts=draws.integers("fonts", 0, len(FONTS), N_CARDS),
        card_text_sizes=draws.integers("text sizes", 0, N_TEXT_SIZES, N_CARDS),
        card_digits=digits,
        shape_cells=places[:, N_CARDS : N_CARDS + MAX_SHAPES],
        shape_colours=shape_colours,
        shape_kinds=_sample_shape_kinds(draws),
        shape_valid=shape_valid,
        repeated_colour=repeated[:, 0],
        cell_sizes=draws.integers("sizes", 0, N_OBJECT_SIZES, cells),
        cell_shift=draws.bits("cell shift", cells, 2),
        text_shift=draws.bits("text shift", N_CARDS, 2),
        colour_jitter=draws.integers("colour jitter", -_COLOUR_JITTER, _COLOUR_JITTER + 1, cells, 3),
        base=level + draws.integers("tint", -_TINT, _TINT + 1, 3),
        slope_y=draws.integers("slope y", -_SLOPE, _SLOPE + 1, 3),
        slope_x=draws.integers("slope x", -_SLOPE, _SLOPE + 1, 3),
        noise_offset=draws.bits("noise offset", 2),
        noise_level=draws.integers("noise level", 6, 25),
    )


def _sample_shape_kinds(draws: Draws) -> torch.Tensor:
    """Kinds of shape (batch, MAX_SHAPES): slot 0 is unique, so that a colour question can always be asked."""
    first = draws.integers("first kind", 0, len(SHAPES), 1)
    others = (first + draws.integers("other kinds", 1, len(SHAPES), MAX_SHAPES - 1)) % len(SHAPES)
    return torch.cat([first, others], dim=1)


def _sample_shape_colours(draws: Draws, repeated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours and validity, both (batch, MAX_SHAPES).

    The repeated colour, (batch, 1), is taken by 1..MAX_SHAPES shapes with equal chance, so that counts are balanced;
    the other shapes take other colours.
    """
    times = draws.integers("times", 1, MAX_SHAPES + 1, 1)
    low = times.clamp(min=MIN_SHAPES)
    n_shapes = low + draws.integers("shapes", 0, MAX_SHAPES + 1 - low, 1)
    valid = torch.arange(MAX_SHAPES, device=times.device) < n_shapes
    keys = draws.order_keys("repeated slots", MAX_SHAPES)
    rank = keys.masked_fill(~valid, torch.iinfo(torch.int64).max).argsort(dim=1).argsort(dim=1)
    others = (repeated + draws.integers("other colours", 1, len(COLOURS), MAX_SHAPES)) % len(COLOURS)
    return torch.where(rank < times, repeated, others), valid
