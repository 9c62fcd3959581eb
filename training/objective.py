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
    cell_corners,
    cell_tiles,
    glyph_centres,
    object_boxes,
    picture_boxes,
)
from training.groups import TOKEN
from training.pixels import MERGE, PATCH
from training.sequences import IGNORE, Sequences

_EMPTY = CLUTTER + 1
_MIN_OVERLAP = 8  # pixels of a token's side that an object must cover to count as shown
_EDGE_SHIFT = 8  # an object's left edge lies at most this many patches before the token
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
        losses = [_mean_loss(part, labels[:, i], self.weight if i == 0 else None) for i, part in enumerate(parts)]
        read = torch.stack([part.argmax(dim=-1) for part in parts], dim=1)
        known = labels != IGNORE
        accuracy = ((read == labels) & known).sum(dim=0) / known.sum(dim=0).clamp(min=1)
        return torch.stack(losses).mean(), accuracy


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Mean cross entropy where there are labels, weighted by class; 0 where there are none."""
    used = (labels != IGNORE).float()
    weights = used if weight is None else used * weight[labels.clamp(min=0)]
    total = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORE, reduction="sum")
    return total / weights.sum().clamp(min=1e-6)


@dataclass(frozen=True)
class _Shown:
    """What each visual token shows; all of shape (batch, tokens) in raster order.

    Attributes
    ----------
    kind, colour : torch.Tensor
        Of the object that covers the token most; ``_EMPTY`` and anything where none covers it well.
    edges : torch.Tensor
        Shape (batch, tokens, 4): left, top, right, bottom of that object in patches.
    named : torch.Tensor
        bool: whether the object is a shape or a card.
    """

    kind: torch.Tensor
    colour: torch.Tensor
    edges: torch.Tensor
    named: torch.Tensor


def _tokens(spec: SceneSpec) -> torch.Tensor:
    """Row and column of each visual token, int64 of shape (tokens, 2)."""
    rows, cols = spec.layout.height // TOKEN, spec.layout.width // TOKEN
    index = torch.arange(rows * cols, device=spec.device)
    return torch.stack([index // cols, index % cols], dim=-1)


def _shown(spec: SceneSpec) -> _Shown:
    kinds, colours = cell_contents(spec)
    boxes = picture_boxes(spec)
    along = []  # pixels that a token and an object share, by column and by row
    for near, size in ((0, spec.layout.width), (1, spec.layout.height)):
        start = torch.arange(size // TOKEN, device=spec.device) * TOKEN
        shared = torch.minimum(boxes[..., near + 2, None], start + TOKEN) - torch.maximum(boxes[..., near, None], start)
        along.append(torch.where(shared >= _MIN_OVERLAP, shared, 0))
    area = (along[1][..., :, None] * along[0][..., None, :]).flatten(2) * (kinds >= 0)[..., None]
    most, owner = area.max(dim=1)
    kind = torch.where(most > 0, kinds.gather(1, owner), _EMPTY)
    edges = torch.cat([boxes[..., :2] // PATCH, -(-boxes[..., 2:] // PATCH)], dim=-1)
    edges = edges.gather(1, owner[..., None].expand(-1, -1, 4))
    return _Shown(kind, colours.gather(1, owner), edges, kind <= CARD)


def token_labels(spec: SceneSpec) -> torch.Tensor:
    """What each visual token shows.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, tokens, len(TOKEN_SIZES)), in raster order. Kind is that of the object that covers the
        token most, "empty" where none covers it well; colour and edges are those of shapes and cards; glyph j is
        labelled on the token that holds its centre; all else is ``IGNORE``.
    """
    shown, tokens = _shown(spec), _tokens(spec)
    colour = torch.where(shown.named, shown.colour, IGNORE)
    corner = MERGE * tokens.flip(-1).repeat(1, 2)  # left, top, left, top: indices in a list could not be captured
    edges = torch.where(shown.named[..., None], shown.edges - corner + _EDGE_SHIFT, IGNORE)

    kinds, _ = cell_contents(spec)
    centres = glyph_centres(spec, object_boxes(spec, cell_tiles(spec, kinds)))
    corners = cell_corners(spec).gather(1, spec.card_cells[..., None].expand(-1, -1, 2))
    row, col = ((centres + corners[:, :, None]) // TOKEN).unbind(-1)
    batch, n_tokens = shown.kind.shape
    # A place without a glyph writes to an extra token that is cut off.
    token = torch.where(spec.card_glyphs == NO_PIECE, n_tokens, row * (spec.layout.width // TOKEN) + col)
    glyphs = torch.full((batch, n_tokens + 1, MAX_GLYPHS), IGNORE, device=spec.device)
    glyphs.scatter_(1, token, spec.card_glyphs)
    return torch.cat([shown.kind[..., None], colour[..., None], glyphs[:, :-1], edges], dim=-1)


def place_labels(spec: SceneSpec) -> torch.Tensor:
    """Where each visual token and its object lie in the picture.

    Returns
    -------
    torch.Tensor
        int64 of shape (batch, tokens, len(PLACE_SIZES)), in raster order.
    """
    shown = _shown(spec)
    places = _tokens(spec).expand(shown.kind.shape[0], -1, -1)
    named = torch.cat([shown.edges, shown.kind[..., None], shown.colour[..., None]], dim=-1)
    return torch.cat([places, torch.where(shown.named[..., None], named, IGNORE)], dim=-1)


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
