"""Losses and running metrics."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsevlm.scenes import COLOURS, SHAPES, TASKS, SceneSpec, cell_contents, digit_centres, object_boxes
from training.pixels import MERGE, PATCH
from training.sequences import IGNORE

_KINDS = len(SHAPES) + 2  # shapes, card, empty
_EMPTY = _KINDS - 1
_DIGITS = 10
TOKEN = PATCH * MERGE  # pixels
_MIN_OVERLAP = 10  # pixels of a token's side that an object must cover to count as shown


class TokenHead(nn.Module):
    """Auxiliary linear readout of what each visual token shows; thrown away after training.

    All tokens share one readout, so that the decoder finds the same code wherever it looks. A first attempt read a
    cell's tokens side by side; digits were then learned as fast, but in a code that attention could not pick up.

    Parameters
    ----------
    hidden : int
        Width of a visual token.
    n_digits : int
        Digits of a card.
    """

    def __init__(self, hidden: int, n_digits: int = 3):
        super().__init__()
        self.sizes = [_KINDS, len(COLOURS), *[_DIGITS] * n_digits]
        self.readout = nn.Linear(hidden, sum(self.sizes))

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
        parts = self.readout(features).float().split(self.sizes, dim=-1)
        labels = token_labels(spec).flatten(1, 2)
        losses = [
            F.cross_entropy(part.flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORE)
            for i, part in enumerate(parts)
        ]
        digits = torch.stack(parts[2:], dim=2).argmax(dim=-1)
        wanted = labels[..., 2:]
        accuracy = ((digits == wanted) & (wanted != IGNORE)).sum() / (wanted != IGNORE).sum()
        return torch.stack(losses).mean(), accuracy


def token_labels(spec: SceneSpec) -> torch.Tensor:
    """What each visual token shows: kind, colour and digits.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, cells, tokens per cell, 2 + digits). Kind and colour are those of the cell's object where
        its box covers the token well, else "empty" and ``IGNORE``; digit j is labelled on the token that holds its
        centre and ``IGNORE`` elsewhere.
    """
    kinds, colours = cell_contents(spec)
    boxes = object_boxes(spec, kinds)
    side = spec.layout.cell // TOKEN
    start = torch.arange(side, device=kinds.device) * TOKEN
    near, far = boxes[..., :2, None], (boxes[..., :2] + boxes[..., 2:])[..., None]
    covered = torch.minimum(far, start + TOKEN) - torch.maximum(near, start) >= _MIN_OVERLAP
    shown = (covered[..., 0, :, None] & covered[..., 1, None, :]).flatten(2) & (kinds >= 0)[..., None]
    kind = torch.where(shown, kinds[..., None], _EMPTY)
    colour = torch.where(shown, colours[..., None], IGNORE)

    place = digit_centres(spec, boxes) // TOKEN
    token = spec.card_cells[..., None] * side**2 + place[..., 0] * side + place[..., 1]
    batch, cells = kinds.shape
    n_digits = spec.card_digits.shape[2]
    digits = torch.full((batch, cells * side**2, n_digits), IGNORE, device=kinds.device)
    digits.scatter_(1, token, spec.card_digits)
    return torch.cat([kind[..., None], colour[..., None], digits.view(batch, cells, side**2, n_digits)], dim=-1)


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
