"""Questions about a batch of scenes, with the answer and the cells that hold it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .seeds import Draws
from .specification import SceneSpec
from .vocabulary import (
    ANSWER_OFFSET,
    COLOURS,
    HALVES,
    N_CARDS,
    N_DIGITS,
    N_WORDINGS,
    SHAPES,
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
    answer_ids : torch.Tensor
        int64 of shape (batch, n_questions), indices into ``ANSWER_TEXTS``.
    cells : torch.Tensor
        bool of shape (batch, n_questions, cells): where the objects are that the question is about.
    """

    tasks: torch.Tensor
    text_ids: torch.Tensor
    answer_ids: torch.Tensor
    cells: torch.Tensor


_Asked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # text argument, answer, cells of one task


def ask(spec: SceneSpec, tasks: torch.Tensor) -> QuestionBatch:
    """Make one question per entry of ``tasks``.

    Parameters
    ----------
    spec : SceneSpec
        The scenes.
    tasks : torch.Tensor
        int64 of shape (batch, n_questions), indices into ``TASKS``. The question in a column depends on the seed,
        the column and the task only.
    """
    draws, columns = Draws(spec.seeds), tasks.shape[1]
    wording = draws.bits("wording", columns)
    text_ids, answer_ids = torch.zeros_like(tasks), torch.zeros_like(tasks)
    cells = torch.zeros(*tasks.shape, spec.layout.n_cells, dtype=torch.bool, device=tasks.device)
    for task_id, task in enumerate(TASKS):
        argument, answer, where = _ASKERS[task](spec, draws, columns)
        n_arguments = _N_ARGUMENTS[task]
        text = TEXT_OFFSET[task] + (wording * N_WORDINGS[task] >> 32) * n_arguments + argument
        chosen = tasks == task_id
        text_ids = torch.where(chosen, text, text_ids)
        answer_ids = torch.where(chosen, ANSWER_OFFSET[task] + answer, answer_ids)
        cells = torch.where(chosen[..., None], where, cells)
    return QuestionBatch(tasks, text_ids, answer_ids, cells)


_N_ARGUMENTS = {
    "number": len(COLOURS),
    "colour": len(SHAPES),
    "exist": len(COLOURS) * len(SHAPES),
    "count": len(COLOURS),
    "half": len(COLOURS) * 2,
}


def _one_hot_cells(spec: SceneSpec, cells: torch.Tensor) -> torch.Tensor:
    """bool (batch, n, cells) from cell indices (batch, n)."""
    return F.one_hot(cells, spec.layout.n_cells).bool()


def _shape_cells(spec: SceneSpec, asked: torch.Tensor) -> torch.Tensor:
    """Cells of the asked shapes: bool (batch, n, MAX_SHAPES) to bool (batch, n, cells)."""
    occupied = _one_hot_cells(spec, spec.shape_cells) & spec.shape_valid[..., None]
    return (asked[..., None] & occupied[:, None]).any(dim=2)


def _ask_number(spec: SceneSpec, draws: Draws, columns: int) -> _Asked:
    card = draws.integers("number card", 0, N_CARDS, columns)
    value = torch.zeros_like(spec.card_cells)
    for position in range(N_DIGITS):
        value = value * 10 + spec.card_digits[:, :, position]
    number = value.gather(1, card) - 10 ** (N_DIGITS - 1)
    return spec.card_colours.gather(1, card), number, _one_hot_cells(spec, spec.card_cells.gather(1, card))


def _ask_colour(spec: SceneSpec, draws: Draws, columns: int) -> _Asked:
    """Ask only for a kind that occurs once among the shapes; slot 0 always does."""
    kinds = spec.shape_kinds.masked_fill(~spec.shape_valid, -1)
    same = (kinds[:, :, None] == kinds[:, None, :]).sum(dim=2)
    allowed = spec.shape_valid & (same == 1)
    slot = (draws.bits("colour slot", columns, kinds.shape[1]) + allowed[:, None] * _SHIFT).argmax(dim=2)
    where = _one_hot_cells(spec, spec.shape_cells.gather(1, slot))
    return spec.shape_kinds.gather(1, slot), spec.shape_colours.gather(1, slot), where


def _ask_exist(spec: SceneSpec, draws: Draws, columns: int) -> _Asked:
    """Half the answers are yes; half of the no questions name a colour and a kind that are both in the scene."""
    pair = spec.shape_colours * len(SHAPES) + spec.shape_kinds
    n_pairs = len(COLOURS) * len(SHAPES)
    present = (F.one_hot(pair, n_pairs).bool() & spec.shape_valid[..., None]).any(dim=1)
    table = present.view(-1, len(COLOURS), len(SHAPES))
    near = (table.any(dim=2, keepdim=True) & table.any(dim=1, keepdim=True)).flatten(1)
    positive = draws.integers("exist answer", 0, 2, columns).bool()
    hard = draws.integers("exist hard", 0, 2, columns).bool()
    fits = torch.where(positive[..., None], present[:, None], ~present[:, None])
    score = draws.bits("exist pair", columns, n_pairs) + fits * (2 * _SHIFT)
    score = score + (fits & hard[..., None] & near[:, None]) * _SHIFT
    asked = score.argmax(dim=2)
    return asked, positive.long(), _shape_cells(spec, (asked[..., None] == pair[:, None]) & spec.shape_valid[:, None])


def _ask_count(spec: SceneSpec, draws: Draws, columns: int) -> _Asked:
    """Ask for the repeated colour in seven of ten questions, for any colour otherwise."""
    anything = draws.integers("count any colour", 0, len(COLOURS), columns)
    repeated = draws.integers("count repeated", 0, 10, columns) < 7
    colour = torch.where(repeated, spec.repeated_colour[:, None], anything)
    asked = (colour[..., None] == spec.shape_colours[:, None]) & spec.shape_valid[:, None]
    return colour, asked.sum(dim=2), _shape_cells(spec, asked)


def _ask_half(spec: SceneSpec, draws: Draws, columns: int) -> _Asked:
    card = draws.integers("half card", 0, N_CARDS, columns)
    vertical = draws.integers("half direction", 0, 2, columns)
    cell = spec.card_cells.gather(1, card)
    right = (cell % spec.layout.cols >= spec.layout.cols // 2).long()
    bottom = (cell // spec.layout.cols >= spec.layout.rows // 2).long()
    answer = torch.where(vertical == 1, HALVES.index("top") + bottom, HALVES.index("left") + right)
    return spec.card_colours.gather(1, card) * 2 + vertical, answer, _one_hot_cells(spec, cell)


_ASKERS: dict[str, Callable[[SceneSpec, Draws, int], _Asked]] = {
    "number": _ask_number,
    "colour": _ask_colour,
    "exist": _ask_exist,
    "count": _ask_count,
    "half": _ask_half,
}
