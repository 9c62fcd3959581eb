"""Losses and running metrics."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsevlm.scenes import COLOURS, SHAPES, TASKS, SceneSpec, cell_contents
from training.sequences import IGNORE

_KINDS = len(SHAPES) + 2  # shapes, card, empty
_CARD, _EMPTY = len(SHAPES), len(SHAPES) + 1
_DIGITS = 10


class CellHead(nn.Module):
    """Auxiliary linear readout of each cell's content from its visual tokens; thrown away after training.

    Parameters
    ----------
    hidden : int
        Width of a visual token.
    tokens_per_cell : int
        Visual tokens of a cell, one attention window.
    n_digits : int
        Digits of a card.
    """

    def __init__(self, hidden: int, tokens_per_cell: int = 16, n_digits: int = 3):
        super().__init__()
        self.tokens_per_cell = tokens_per_cell
        self.sizes = [_KINDS, len(COLOURS), *[_DIGITS] * n_digits]
        self.readout = nn.Linear(hidden * tokens_per_cell, sum(self.sizes))

    def forward(self, features: torch.Tensor, spec: SceneSpec) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and digit accuracy.

        Parameters
        ----------
        features : torch.Tensor
            Shape (batch, visual tokens, hidden) in window order, so that a cell's tokens are consecutive.

        Returns
        -------
        tuple of torch.Tensor
            Mean cross entropy over what is to be read, and the share of digits read correctly; both scalars.
        """
        cells = features.unflatten(1, (-1, self.tokens_per_cell)).flatten(2)
        parts = self.readout(cells).float().split(self.sizes, dim=-1)
        labels = cell_labels(spec)
        losses = [
            F.cross_entropy(part.flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORE)
            for i, part in enumerate(parts)
        ]
        digits = torch.stack(parts[2:], dim=2).argmax(dim=-1)
        wanted = labels[..., 2:]
        accuracy = ((digits == wanted) & (wanted != IGNORE)).sum() / (wanted != IGNORE).sum()
        return torch.stack(losses).mean(), accuracy


def cell_labels(spec: SceneSpec) -> torch.Tensor:
    """What each cell holds, int64 of shape (batch, cells, 2 + digits): kind, colour, digits; ``IGNORE`` if none."""
    kinds, colours = cell_contents(spec)
    colours = colours.masked_fill(kinds < 0, IGNORE)
    digits = torch.full((*kinds.shape, spec.card_digits.shape[2]), IGNORE, device=kinds.device)
    digits.scatter_(1, spec.card_cells[..., None].expand_as(spec.card_digits), spec.card_digits)
    return torch.cat([torch.where(kinds < 0, _EMPTY, kinds)[..., None], colours[..., None], digits], dim=-1)


@dataclass(frozen=True)
class AnswerScore:
    """Loss over answer tokens and exact matches.

    Attributes
    ----------
    loss : torch.Tensor
        Scalar: mean cross entropy over answer tokens.
    hits, asked : torch.Tensor
        float32 of shape (tasks,): questions whose answer tokens are all the most likely ones, and questions asked.
    """

    loss: torch.Tensor
    hits: torch.Tensor
    asked: torch.Tensor


def score_answers(logits: torch.Tensor, targets: torch.Tensor, tasks: torch.Tensor) -> AnswerScore:
    """Teacher-forced score; all-tokens-most-likely is the same as an exact match of greedy decoding.

    Parameters
    ----------
    logits : torch.Tensor
        Shape (batch, n_questions * answer_len, vocabulary).
    targets : torch.Tensor
        int64 of shape (batch, n_questions, answer_len), padded with ``IGNORE``.
    tasks : torch.Tensor
        int64 of shape (batch, n_questions).
    """
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    right = (logits.argmax(dim=-1).view_as(targets) == targets) | (targets == IGNORE)
    exact = right.all(dim=-1).flatten().float()
    flat = tasks.flatten()
    zeros = torch.zeros(len(TASKS), device=logits.device)
    return AnswerScore(loss, zeros.index_add(0, flat, exact), zeros.index_add(0, flat, torch.ones_like(exact)))
