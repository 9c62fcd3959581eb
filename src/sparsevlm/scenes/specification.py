"""Contents of scenes, sampled from their seeds."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from .seeds import Draws
from .vocabulary import (
    COLOURS,
    DEFAULT_LAYOUT,
    FONTS,
    GLYPHS,
    MAX_GLYPHS,
    MAX_SHAPES,
    MIN_SHAPES,
    N_CARDS,
    N_DIGITS,
    N_NUMBER_CARDS,
    N_WORD_CARDS,
    NO_PIECE,
    SHAPES,
    WORDS,
    Layout,
)

N_SHAPE_SIZES = 3
N_TEXT_SIZES = 4
N_WORD_SIZES = 3  # the largest size has no room for four letters
N_CLUTTER = 12
NOTHING = -1

_COLOUR_JITTER = 14
_BASE_RANGE = (55, 160)
_TINT = 18
_SLOPE = 45
_CLUTTER_IN_TEN = 6


@dataclass(frozen=True)
class SceneSpec:
    """A batch of scene descriptions; all tensors are int64 unless said otherwise.

    Attributes
    ----------
    layout : Layout
        The grid, common to the batch.
    draws : Draws
        Random numbers of the scenes, for the questions.
    card_cells, card_colours, card_fonts, card_text_sizes : torch.Tensor
        Shape (batch, N_CARDS): cell index, colour index, font index, text size index. The first N_NUMBER_CARDS cards
        carry numbers, the others words; where a card lies has nothing to do with its slot.
    card_glyphs : torch.Tensor
        Shape (batch, N_CARDS, MAX_GLYPHS): indices into ``GLYPHS``, padded with -1. Numbers do not begin with 0.
    shape_cells, shape_colours, shape_kinds : torch.Tensor
        Shape (batch, MAX_SHAPES); only slots with ``shape_valid`` are drawn.
    repeated_colour : torch.Tensor
        Shape (batch,): the shape colour that may occur up to MAX_SHAPES - 1 times.
    shape_valid : torch.Tensor
        bool of shape (batch, MAX_SHAPES). Slot 0 is valid and its kind is unlike all others of its scene.
    cell_sizes, cell_clutter : torch.Tensor
        Shape (batch, cells): size index of a shape; kind of clutter in a cell without an object, or -1.
    grid_shift : torch.Tensor
        Shape (batch, 2): where the grid's upper left corner lies in the picture, (y, x) in pixels.
    cell_shift, text_shift : torch.Tensor
        Shape (batch, cells, 2) and (batch, N_CARDS, 2): 32-bit draws for the (y, x) jitter, scaled by the
        room that is left when the object's size is known.
    colour_jitter : torch.Tensor
        Shape (batch, cells, 3): added to the object's RGB.
    clutter_grey : torch.Tensor
        Shape (batch, cells, 1): grey level of clutter.
    base, slope_y, slope_x : torch.Tensor
        Shape (batch, 3): background RGB and its change over the whole height and width.
    noise_offset : torch.Tensor
        Shape (batch, 2): where the noise tile starts.
    noise_level : torch.Tensor
        Shape (batch,): noise amplitude in grey levels.
    """

    layout: Layout
    draws: Draws
    card_cells: torch.Tensor
    card_colours: torch.Tensor
    card_fonts: torch.Tensor
    card_text_sizes: torch.Tensor
    card_glyphs: torch.Tensor
    shape_cells: torch.Tensor
    shape_colours: torch.Tensor
    shape_kinds: torch.Tensor
    shape_valid: torch.Tensor
    repeated_colour: torch.Tensor
    cell_sizes: torch.Tensor
    cell_clutter: torch.Tensor
    grid_shift: torch.Tensor
    cell_shift: torch.Tensor
    text_shift: torch.Tensor
    colour_jitter: torch.Tensor
    clutter_grey: torch.Tensor
    base: torch.Tensor
    slope_y: torch.Tensor
    slope_x: torch.Tensor
    noise_offset: torch.Tensor
    noise_level: torch.Tensor

    @property
    def batch(self) -> int:
        """Number of scenes."""
        return self.card_cells.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.card_cells.device


def sample_specs(seeds: torch.Tensor, layout: Layout = DEFAULT_LAYOUT, picture: int = 0) -> SceneSpec:
    """Sample the scenes of the given seeds on the seeds' device.

    Parameters
    ----------
    seeds : torch.Tensor
        int64 of shape (batch,).
    layout : Layout
        Grid to place the objects on; needs at least ``N_CARDS + MAX_SHAPES`` cells.
    picture : int
        Which of several unlike pictures of a seed.

    Raises
    ------
    ValueError
        If the layout has too few cells.
    """
    if layout.n_cells < N_CARDS + MAX_SHAPES:
        raise ValueError(f"a layout needs at least {N_CARDS + MAX_SHAPES} cells, got {layout.rows}x{layout.cols}")
    draws, cells = Draws(seeds, picture), layout.n_cells
    places = draws.permutation("cells", cells)
    repeated = draws.integers("repeated colour", 0, len(COLOURS), 1)
    shape_colours, shape_valid = _sample_shape_colours(draws, repeated)
    level = draws.integers("base", *_BASE_RANGE, 1)
    clutter = draws.integers("clutter kind", 0, N_CLUTTER, cells)
    some = draws.integers("clutter", 0, 10, cells) < _CLUTTER_IN_TEN
    return SceneSpec(
        layout=layout,
        draws=draws,
        card_cells=places[:, :N_CARDS],
        card_colours=draws.permutation("card colours", len(COLOURS))[:, :N_CARDS],
        card_fonts=draws.integers("fonts", 0, len(FONTS), N_CARDS),
        card_text_sizes=torch.cat(
            [
                draws.integers("number sizes", 0, N_TEXT_SIZES, N_NUMBER_CARDS),
                draws.integers("word sizes", 0, N_WORD_SIZES, N_WORD_CARDS),
            ],
            dim=1,
        ),
        card_glyphs=_sample_glyphs(draws),
        shape_cells=places[:, N_CARDS : N_CARDS + MAX_SHAPES],
        shape_colours=shape_colours,
        shape_kinds=_sample_shape_kinds(draws),
        shape_valid=shape_valid,
        repeated_colour=repeated[:, 0],
        cell_sizes=draws.integers("sizes", 0, N_SHAPE_SIZES, cells),
        cell_clutter=torch.where(some, clutter, NOTHING),
        grid_shift=torch.stack(
            [draws.integers(f"grid shift {axis}", 0, room + 1) for axis, room in enumerate(layout.margin)], dim=1
        ),
        cell_shift=draws.bits("cell shift", cells, 2),
        text_shift=draws.bits("text shift", N_CARDS, 2),
        colour_jitter=draws.integers("colour jitter", -_COLOUR_JITTER, _COLOUR_JITTER + 1, cells, 3),
        clutter_grey=draws.integers("clutter grey", 20, 236, cells, 1),
        base=level + draws.integers("tint", -_TINT, _TINT + 1, 3),
        slope_y=draws.integers("slope y", -_SLOPE, _SLOPE + 1, 3),
        slope_x=draws.integers("slope x", -_SLOPE, _SLOPE + 1, 3),
        noise_offset=draws.bits("noise offset", 2),
        noise_level=draws.integers("noise level", 6, 25),
    )


def card_numbers(spec: SceneSpec) -> torch.Tensor:
    """Values of the number cards, int64 of shape (batch, N_NUMBER_CARDS)."""
    digits = spec.card_glyphs[:, :N_NUMBER_CARDS, :N_DIGITS]
    value = torch.zeros_like(digits[..., 0])
    for position in range(N_DIGITS):
        value = value * 10 + digits[..., position]
    return value


def _sample_glyphs(draws: Draws) -> torch.Tensor:
    """Text of the cards, (batch, N_CARDS, MAX_GLYPHS); the numbers of a scene differ."""
    least, count = 10 ** (N_DIGITS - 1), 9 * 10 ** (N_DIGITS - 1)
    value = draws.integers("number", 0, count, 1)
    apart = draws.integers("other numbers", 1, count, N_NUMBER_CARDS - 1)
    values = least + torch.cat([value, (value + apart) % count], dim=1)
    digits = torch.stack([values // 10**place % 10 for place in reversed(range(N_DIGITS))], dim=-1)
    digits = torch.nn.functional.pad(digits, (0, MAX_GLYPHS - N_DIGITS), value=NO_PIECE)
    word = draws.integers("word", 0, len(WORDS), N_WORD_CARDS)
    return torch.cat([digits, _word_table(str(value.device))[word]], dim=1)


@lru_cache(maxsize=8)
def _word_table(device: str) -> torch.Tensor:
    """Glyphs of ``WORDS``, (words, MAX_GLYPHS); made once, as no table may come from the host within a CUDA graph."""
    rows = [[GLYPHS.index(letter) for letter in word] + [NO_PIECE] * (MAX_GLYPHS - len(word)) for word in WORDS]
    return torch.tensor(rows, device=device)


def _sample_shape_kinds(draws: Draws) -> torch.Tensor:
    """Kinds of shape (batch, MAX_SHAPES): slot 0 is unique, so that a colour question can always be asked."""
    first = draws.integers("first kind", 0, len(SHAPES), 1)
    others = (first + draws.integers("other kinds", 1, len(SHAPES), MAX_SHAPES - 1)) % len(SHAPES)
    return torch.cat([first, others], dim=1)


def _sample_shape_colours(draws: Draws, repeated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colours and validity, both (batch, MAX_SHAPES).

    The repeated colour, (batch, 1), is taken by 1..MAX_SHAPES - 1 shapes, more often by few, so that it is no good
    guess; the other shapes, at least one, take other colours.
    """
    tenth = draws.integers("times", 0, 10, 1)
    times = 1 + (tenth >= 3).long() + (tenth >= 5) + (tenth >= 7) + (tenth >= 9)
    low = (times + 1).clamp(min=MIN_SHAPES)
    n_shapes = low + draws.integers("shapes", 0, MAX_SHAPES + 1 - low, 1)
    valid = torch.arange(MAX_SHAPES, device=times.device) < n_shapes
    keys = draws.order_keys("repeated slots", MAX_SHAPES)
    rank = keys.masked_fill(~valid, torch.iinfo(torch.int64).max).argsort(dim=1).argsort(dim=1)
    others = (repeated + draws.integers("other colours", 1, len(COLOURS), MAX_SHAPES)) % len(COLOURS)
    return torch.where(rank < times, repeated, others), valid
