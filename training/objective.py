"""Losses and running metrics."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from sparsevlm.scenes import (
    CARD,
    CLUTTER,
    COLOURS,
    GLYPHS,
    MAX_GLYPHS,
    NO_PIECE,
    TASKS,
    SceneSpec,
    cell_contents,
    cell_tiles,
    glyph_centres,
    object_boxes,
)
from training.groups import TOKEN
from training.pixels import MERGE, PATCH
from training.sequences import IGNORE, Sequences

_EMPTY = CLUTTER + 1
_MIN_OVERLAP = 8  # pixels of a token's side that an object must cover to count as shown
_EDGE_SHIFT = 8  # an object's edges lie within its cell, at most this many patches before the token
_EDGE_CLASSES = 18
_MAX_PATCHES = 64
_MAX_TOKENS = _MAX_PATCHES // MERGE

# What each visual token is asked: kind, colour, glyphs, edges (left, top, right, bottom) relative to itself.
TOKEN_SIZES = (_EMPTY + 1, len(COLOURS), *[len(GLYPHS)] * MAX_GLYPHS, *[_EDGE_CLASSES] * 4)
# What each visual token is asked within the decoder: its row and column, then its object's edges in the picture, kind
# and colour.
PLACE_SIZES = (_MAX_TOKENS, _MAX_TOKENS, *[_MAX_PATCHES + 1] * 4, CARD + 1, len(COLOURS))


class Readout(nn.Module):
    """Auxiliary linear readout that all visual tokens share; thrown away after training.

    One code for all tokens lets the decoder find the same wherever it looks. A first attempt read a cell's tokens side
    by side; digits were then learned as fast, but in a code that attention could not pick up.

    Parameters
    ----------
    hidden : int
        Width of a visual token.
    sizes : tuple of int
        Classes of each thing that is read.
    rare : int, optional
        Number of classes of the first thing that weigh ten times the others: most tokens show nothing.
    """

    weight: torch.Tensor | None

    def __init__(self, hidden: int, sizes: tuple[int, ...], rare: int = 0):
        super().__init__()
        self.sizes = sizes
        weight = torch.where(torch.arange(sizes[0]) < rare, 1.0, 0.1) if rare else None
        self.register_buffer("weight", weight)
        self.linear = nn.Linear(hidden, sum(sizes))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and accuracy by thing.

        Parameters
        ----------
        tokens : torch.Tensor
            Shape (n, hidden).
        labels : torch.Tensor
            int64 of shape (n, things), ``IGNORE`` where there is nothing to read.

        Returns
        -------
        tuple of torch.Tensor
            Mean cross entropy over things, scalar; share of labels read correctly, (things,).
        """
        parts = self.linear(tokens).float().split(self.sizes, dim=-1)
        losses = [
            F.cross_entropy(part, labels[:, i], weight=self.weight if i == 0 else None, ignore_index=IGNORE)
            for i, part in enumerate(parts)
        ]
        read = torch.stack([part.argmax(dim=-1) for part in parts], dim=1)
        known = labels != IGNORE
        accuracy = ((read == labels) & known).sum(dim=0) / known.sum(dim=0).clamp(min=1)
        return torch.stack(losses).mean(), accuracy


@dataclass(frozen=True)
class _Shown:
    """Objects by token: boxes within their cells, and which tokens a cell's object covers."""

    kinds: torch.Tensor
    colours: torch.Tensor
    boxes: torch.Tensor
    covered: torch.Tensor  # bool of shape (batch, cells, tokens per cell)

    @property
    def named(self) -> torch.Tensor:
        """Tokens of shapes and cards."""
        return self.covered & ((self.kinds >= 0) & (self.kinds != CLUTTER))[..., None]


def _shown(spec: SceneSpec) -> _Shown:
    kinds, colours = cell_contents(spec)
    boxes = object_boxes(spec, cell_tiles(spec, kinds))
    start = torch.arange(spec.layout.cell // TOKEN, device=kinds.device) * TOKEN
    near, far = boxes[..., :2, None], (boxes[..., :2] + boxes[..., 2:])[..., None]
    along = torch.minimum(far, start + TOKEN) - torch.maximum(near, start) >= _MIN_OVERLAP
    covered = (along[..., 0, :, None] & along[..., 1, None, :]).flatten(2) & (kinds >= 0)[..., None]
    return _Shown(kinds, colours, boxes, covered)


def _edges(shown: _Shown) -> torch.Tensor:
    """Left, top, right, bottom of each cell's object in patches from the cell's corner, (batch, cells, 1, 4)."""
    top, left, height, width = shown.boxes.unbind(-1)
    return torch.stack([left // PATCH, top // PATCH, -(-(left + width) // PATCH), -(-(top + height) // PATCH)], dim=-1)[
        :, :, None
    ]


def token_labels(spec: SceneSpec) -> torch.Tensor:
    """What each visual token shows.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, cells, tokens per cell, len(TOKEN_SIZES)). Kind is that of the cell's object where its
        box covers the token well, else "empty"; colour and edges are those of shapes and cards; glyph j is labelled on
        the token that holds its centre; all else is ``IGNORE``.
    """
    shown = _shown(spec)
    side = spec.layout.cell // TOKEN
    kind = torch.where(shown.covered, shown.kinds[..., None], _EMPTY)
    colour = torch.where(shown.named, shown.colours[..., None], IGNORE)
    index = torch.arange(side**2, device=kind.device)
    corner = MERGE * torch.stack([index % side, index // side] * 2, dim=-1)  # of the token, in patches
    edges = torch.where(shown.named[..., None], _edges(shown) - corner + _EDGE_SHIFT, IGNORE)

    place = (glyph_centres(spec, shown.boxes) // TOKEN).clamp(0, side - 1)
    token = spec.card_cells[..., None] * side**2 + place[..., 0] * side + place[..., 1]
    batch, cells = shown.kinds.shape
    # A place without a glyph writes to an extra token that is cut off.
    token = torch.where(spec.card_glyphs == NO_PIECE, cells * side**2, token)
    glyphs = torch.full((batch, cells * side**2 + 1, MAX_GLYPHS), IGNORE, device=kind.device)
    glyphs.scatter_(1, token, spec.card_glyphs)
    glyphs = glyphs[:, :-1].view(batch, cells, side**2, MAX_GLYPHS)
    return torch.cat([kind[..., None], colour[..., None], glyphs, edges], dim=-1)


def place_labels(spec: SceneSpec) -> torch.Tensor:
    """Where each visual token and its object lie in the picture.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, cells, tokens per cell, len(PLACE_SIZES)).
    """
    shown = _shown(spec)
    layout, side = spec.layout, spec.layout.cell // TOKEN
    cell = torch.arange(layout.n_cells, device=shown.kinds.device)
    index = torch.arange(side**2, device=cell.device)
    row = (cell // layout.cols * side)[:, None] + index // side
    col = (cell % layout.cols * side)[:, None] + index % side
    places = torch.stack([row, col], dim=-1).expand(shown.kinds.shape[0], -1, -1, -1)
    corner = side * MERGE * torch.stack([cell % layout.cols, cell // layout.cols] * 2, dim=-1)
    edges = torch.where(shown.named[..., None], _edges(shown) + corner[:, None], IGNORE)
    named = torch.stack([shown.kinds, shown.colours], dim=-1)[:, :, None]
    return torch.cat([places, edges, torch.where(shown.named[..., None], named, IGNORE)], dim=-1)


@dataclass(frozen=True)
class AnswerScore:
    """Loss over answers and exact matches.

    Attributes
    ----------
    loss : torch.Tensor
        Scalar, a sum over answer tokens; divide by ``weight``.
    weight : torch.Tensor
        Scalar. A token of an answer of n tokens weighs n**-0.5, so that long answers do not drown short ones.
    hits, asked : torch.Tensor
        float32 of shape (tasks,): questions whose answer tokens are all the most likely ones, and questions asked.
    """

    loss: torch.Tensor
    weight: torch.Tensor
    hits: torch.Tensor
    asked: torch.Tensor

    def __add__(self, other: "AnswerScore") -> "AnswerScore":
        return AnswerScore(
            self.loss + other.loss, self.weight + other.weight, self.hits + other.hits, self.asked + other.asked
        )


def score_answers(logits: torch.Tensor, sequences: Sequences, tasks: torch.Tensor) -> AnswerScore:
    """Teacher-forced score; all-tokens-most-likely is the same as an exact match of greedy decoding.

    Parameters
    ----------
    logits : torch.Tensor
        Shape (batch, tail, vocabulary).
    sequences : Sequences
    tasks : torch.Tensor
        int64 of shape (batch, n_questions).
    """
    targets, owner = sequences.targets, sequences.owner
    used = targets != IGNORE
    lengths = torch.zeros(tasks.shape, device=logits.device).scatter_add_(1, owner, used.float())
    weights = used * lengths.gather(1, owner).clamp(min=1).rsqrt()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
    wrong = used & (logits.argmax(dim=-1) != targets)
    n_wrong = torch.zeros(tasks.shape, device=logits.device).scatter_add_(1, owner, wrong.float())
    asked = sequences.complete.flatten().float()
    exact = asked * (n_wrong.flatten() == 0)
    zeros, flat = torch.zeros(len(TASKS), device=logits.device), tasks.flatten()
    return AnswerScore(
        (losses * weights.flatten()).sum(),
        weights.sum(),
        zeros.index_add(0, flat, exact),
        zeros.index_add(0, flat, asked),
    )
