"""Questions about a batch of scenes, with the answer and the cells that hold it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .render import picture_boxes
from .specification import SceneSpec, card_numbers
from .vocabulary import (
    BOX_UNIT,
    COLOURS,
    COMMA,
    HALVES,
    MAX_PIECES,
    N_ARGUMENTS,
    N_CARDS,
    N_NUMBER_CARDS,
    N_WORDINGS,
    NO_PIECE,
    PAIR,
    PICTURES,
    PIECE_ID,
    SHAPES,
    SINGLE_TASKS,
    SPACE,
    TASKS,
    TEXT_OFFSET,
)

_SHIFT = 2**33  # above any 32-bit draw, so that adding it decides a ranking of draws


@dataclass(frozen=True)
class QuestionBatch:
    """Questions of a batch of scenes.

    Attributes
    ----------
    tasks : torch.Tensor
        int64 of shape (batch, n_questions), indices into ``TASKS``.
    text_ids : torch.Tensor
        int64 of shape (batch, n_questions), indices into ``QUESTION_TEXTS``.
    pieces : torch.Tensor
        int64 of shape (batch, n_questions, MAX_PIECES): the answer as indices into ``PIECES``, padded with -1.
    cells : torch.Tensor
        bool of shape (batch, n_questions, cells): where the objects are that the question is about, in the picture
        that it is about.
    """

    tasks: torch.Tensor
    text_ids: torch.Tensor
    pieces: torch.Tensor
    cells: torch.Tensor


@dataclass(frozen=True)
class _Asked:
    """One task, all of shape (batch, columns, ...): argument of the text, answer, cells."""

    argument: torch.Tensor
    pieces: torch.Tensor
    cells: torch.Tensor


def ask(spec: SceneSpec, tasks: torch.Tensor) -> QuestionBatch:
    """Make one question about a single picture per entry of ``tasks``.

    Parameters
    ----------
    spec : SceneSpec
        The scenes.
    tasks : torch.Tensor
        int64 of shape (batch, n_questions), indices into ``SINGLE_TASKS``. The question in a column depends on the
        seed, the column and the task only.
    """
    columns = tasks.shape[1]
    asked = {task: _ASKERS[task](spec, columns) for task in SINGLE_TASKS}
    return _batch(spec, tasks, asked)


def ask_pair(first: SceneSpec, second: SceneSpec, columns: int) -> QuestionBatch:
    """Make ``columns`` questions about each pair of pictures.

    Half of them ask for a number in one of the pictures, half for the picture that shows a card of a colour; arguments
    are (colour, picture) for the former, then colours for the latter.
    """
    specs = (first, second)
    draws = first.draws
    picture = draws.integers("pair picture", 0, len(PICTURES), columns)
    in_second = picture.bool()
    card = draws.integers("pair card", 0, N_NUMBER_CARDS, columns)
    number = _of_picture(in_second, *(_glyphs(spec, card) for spec in specs))
    number_colour = _of_picture(in_second, *(spec.card_colours.gather(1, card) for spec in specs))
    number_cell = _of_picture(in_second, *(spec.card_cells.gather(1, card) for spec in specs))

    shared = (first.card_colours[:, :, None] == second.card_colours[:, None]).any(dim=2)
    shared_too = (second.card_colours[:, :, None] == first.card_colours[:, None]).any(dim=2)
    alone = _of_picture(in_second, ~shared[:, None].expand(-1, columns, -1), ~shared_too[:, None])
    slot = (draws.bits("pair slot", columns, N_CARDS) + alone * _SHIFT).argmax(dim=2)
    alone_colour = _of_picture(in_second, *(spec.card_colours.gather(1, slot) for spec in specs))
    alone_cell = _of_picture(in_second, *(spec.card_cells.gather(1, slot) for spec in specs))

    asks_which = draws.integers("pair kind", 0, 2, columns).bool() & alone.any(dim=2)
    n_numbers = len(COLOURS) * len(PICTURES)
    argument = torch.where(asks_which, n_numbers + alone_colour, number_colour * len(PICTURES) + picture)
    pieces = torch.where(asks_which[..., None], _padded(_word(PICTURES, picture)), _padded(number))
    cell = torch.where(asks_which, alone_cell, number_cell)
    asked = {PAIR: _Asked(argument, pieces, _one_hot_cells(first, cell))}
    return _batch(first, torch.full_like(picture, TASKS.index(PAIR)), asked)


def _of_picture(in_second: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    shape = in_second.shape + (1,) * (first.ndim - in_second.ndim)
    return torch.where(in_second.view(shape), second, first)


def _batch(spec: SceneSpec, tasks: torch.Tensor, asked: dict[str, _Asked]) -> QuestionBatch:
    wording = spec.draws.bits("wording", tasks.shape[1])
    text_ids = torch.zeros_like(tasks)
    pieces = torch.full((*tasks.shape, MAX_PIECES), NO_PIECE, device=tasks.device)
    cells = torch.zeros(*tasks.shape, spec.layout.n_cells, dtype=torch.bool, device=tasks.device)
    for task, one in asked.items():
        chosen = tasks == TASKS.index(task)
        text = TEXT_OFFSET[task] + (wording * N_WORDINGS[task] >> 32) * N_ARGUMENTS[task] + one.argument
        text_ids = torch.where(chosen, text, text_ids)
        pieces = torch.where(chosen[..., None], _padded(one.pieces), pieces)
        cells = torch.where(chosen[..., None], one.cells, cells)
    return QuestionBatch(tasks, text_ids, pieces, cells)


def _padded(pieces: torch.Tensor) -> torch.Tensor:
    return F.pad(pieces, (0, MAX_PIECES - pieces.shape[-1]), value=NO_PIECE)


def _word(words: tuple[str, ...], index: torch.Tensor) -> torch.Tensor:
    """Answers of one piece: (...) to (..., 1); the words stand side by side in ``PIECES``."""
    return PIECE_ID[words[0]] + index[..., None]


def _glyphs(spec: SceneSpec, card: torch.Tensor) -> torch.Tensor:
    """Text of chosen cards, (batch, n) to (batch, n, MAX_GLYPHS); a glyph's piece has its own number."""
    return spec.card_glyphs.gather(1, card[..., None].expand(-1, -1, spec.card_glyphs.shape[2]))


def _one_hot_cells(spec: SceneSpec, cells: torch.Tensor) -> torch.Tensor:
    """bool (batch, n, cells) from cell indices (batch, n)."""
    return F.one_hot(cells, spec.layout.n_cells).bool()


def _boxes(spec: SceneSpec, cells: torch.Tensor) -> torch.Tensor:
    """Pixel boxes of what stands in cells, (batch, n) to (batch, n, 4)."""
    return picture_boxes(spec).gather(1, cells[..., None].expand(-1, -1, 4))


def _shape_cells(spec: SceneSpec, asked: torch.Tensor) -> torch.Tensor:
    """Cells of the asked shapes: bool (batch, n, MAX_SHAPES) to bool (batch, n, cells)."""
    occupied = _one_hot_cells(spec, spec.shape_cells) & spec.shape_valid[..., None]
    return (asked[..., None] & occupied[:, None]).any(dim=2)


def _ask_text(spec: SceneSpec, card: torch.Tensor) -> _Asked:
    cells = _one_hot_cells(spec, spec.card_cells.gather(1, card))
    return _Asked(spec.card_colours.gather(1, card), _glyphs(spec, card), cells)


def _ask_number(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: colour."""
    return _ask_text(spec, spec.draws.integers("number card", 0, N_NUMBER_CARDS, columns))


def _ask_word(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: colour."""
    return _ask_text(spec, spec.draws.integers("word card", N_NUMBER_CARDS, N_CARDS, columns))


def _unique_shape(spec: SceneSpec, stream: str, columns: int) -> torch.Tensor:
    """Slots (batch, columns) of shapes whose kind occurs once in the scene; slot 0 always does."""
    kinds = spec.shape_kinds.masked_fill(~spec.shape_valid, -1)
    same = (kinds[:, :, None] == kinds[:, None, :]).sum(dim=2)
    allowed = spec.shape_valid & (same == 1)
    return (spec.draws.bits(stream, columns, kinds.shape[1]) + allowed[:, None] * _SHIFT).argmax(dim=2)


def _ask_colour(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: shape."""
    slot = _unique_shape(spec, "colour slot", columns)
    cells = _one_hot_cells(spec, spec.shape_cells.gather(1, slot))
    return _Asked(spec.shape_kinds.gather(1, slot), _word(COLOURS, spec.shape_colours.gather(1, slot)), cells)


def _ask_exist(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: colour and shape. Half the answers are yes; three in four of the no questions name a colour and a kind
    that are both in the scene."""
    pair = spec.shape_colours * len(SHAPES) + spec.shape_kinds
    n_pairs = len(COLOURS) * len(SHAPES)
    present = (F.one_hot(pair, n_pairs).bool() & spec.shape_valid[..., None]).any(dim=1)
    table = present.view(-1, len(COLOURS), len(SHAPES))
    near = (table.any(dim=2, keepdim=True) & table.any(dim=1, keepdim=True)).flatten(1)
    positive = spec.draws.integers("exist answer", 0, 2, columns).bool()
    hard = spec.draws.integers("exist hard", 0, 4, columns).bool()
    fits = torch.where(positive[..., None], present[:, None], ~present[:, None])
    score = spec.draws.bits("exist pair", columns, n_pairs) + fits * (2 * _SHIFT)
    score = score + (fits & hard[..., None] & near[:, None]) * _SHIFT
    asked = score.argmax(dim=2)
    cells = _shape_cells(spec, (asked[..., None] == pair[:, None]) & spec.shape_valid[:, None])
    return _Asked(asked, _word(("no", "yes"), positive.long()), cells)


def _ask_count(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: colour, the repeated one in seven of ten questions, any one otherwise."""
    anything = spec.draws.integers("count any colour", 0, len(COLOURS), columns)
    repeated = spec.draws.integers("count repeated", 0, 10, columns) < 7
    colour = torch.where(repeated, spec.repeated_colour[:, None], anything)
    asked = (colour[..., None] == spec.shape_colours[:, None]) & spec.shape_valid[:, None]
    return _Asked(colour, asked.sum(dim=2)[..., None], _shape_cells(spec, asked))  # a digit's piece is the digit


def _ask_half(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: colour and direction; the card's centre decides."""
    card = spec.draws.integers("half card", 0, N_CARDS, columns)
    vertical = spec.draws.integers("half direction", 0, 2, columns)
    cell = spec.card_cells.gather(1, card)
    left, top, right, bottom = _boxes(spec, cell).unbind(-1)
    right = (left + right >= spec.layout.width).long()
    bottom = (top + bottom >= spec.layout.height).long()
    answer = torch.where(vertical == 1, HALVES.index("top") + bottom, HALVES.index("left") + right)
    argument = spec.card_colours.gather(1, card) * 2 + vertical
    return _Asked(argument, _word(HALVES, answer), _one_hot_cells(spec, cell))


def _ask_compare(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: the colours of the number cards, in either order."""
    one = spec.draws.integers("compare card", 0, N_NUMBER_CARDS, columns)
    other = (one + 1) % N_NUMBER_CARDS
    numbers = card_numbers(spec)
    larger = torch.where(numbers.gather(1, one) > numbers.gather(1, other), one, other)
    argument = spec.card_colours.gather(1, one) * len(COLOURS) + spec.card_colours.gather(1, other)
    cells = _one_hot_cells(spec, spec.card_cells[:, :N_NUMBER_CARDS]).any(dim=1, keepdim=True)
    return _Asked(argument, _word(COLOURS, spec.card_colours.gather(1, larger)), cells.expand(-1, columns, -1))


def _ask_list(spec: SceneSpec, columns: int) -> _Asked:
    """No argument. The answer goes through the cards in the order of ``COLOURS``: "red 527, green CAT, pink 381"."""
    order = spec.card_colours.argsort(dim=1)
    colours, glyphs = spec.card_colours.gather(1, order), _glyphs(spec, order)
    parts = []
    for card in range(N_CARDS):
        if card:
            parts.append(torch.full_like(order[:, :1], PIECE_ID[COMMA]))
        parts.append(PIECE_ID[SPACE * bool(card) + COLOURS[0]] + colours[:, card, None])
        parts += [torch.full_like(order[:, :1], PIECE_ID[SPACE]), glyphs[:, card]]
    pieces = torch.cat(parts, dim=1)
    pieces = pieces.gather(1, (pieces == NO_PIECE).long().argsort(dim=1, stable=True))  # padding to the end
    cells = _one_hot_cells(spec, spec.card_cells).any(dim=1, keepdim=True)
    return _Asked(torch.zeros_like(order[:, :1]), pieces[:, None], cells)


def _ask_box(spec: SceneSpec, columns: int) -> _Asked:
    """Argument: a card's colour, or (twice as often) a shape that occurs once. The answer: left, top, right and bottom
    edge in units of ``BOX_UNIT`` pixels, rounded outwards, two digits each."""
    card = spec.draws.integers("box card", 0, N_CARDS, columns)
    slot = _unique_shape(spec, "box slot", columns)
    is_card = spec.draws.integers("box of card", 0, 3, columns) == 0
    cell = torch.where(is_card, spec.card_cells.gather(1, card), spec.shape_cells.gather(1, slot))
    argument = torch.where(is_card, spec.card_colours.gather(1, card), len(COLOURS) + spec.shape_kinds.gather(1, slot))
    pixels = _boxes(spec, cell)
    edges = torch.cat([pixels[..., :2] // BOX_UNIT, -(-pixels[..., 2:] // BOX_UNIT)], dim=-1)
    digits = torch.stack([edges // 10, edges % 10, torch.full_like(edges, PIECE_ID[COMMA])], dim=-1)
    return _Asked(argument, digits.flatten(2)[..., :-1], _one_hot_cells(spec, cell))


_ASKERS: dict[str, Callable[[SceneSpec, int], _Asked]] = {
    "number": _ask_number,
    "word": _ask_word,
    "colour": _ask_colour,
    "exist": _ask_exist,
    "count": _ask_count,
    "half": _ask_half,
    "compare": _ask_compare,
    "list": _ask_list,
    "box": _ask_box,
}
