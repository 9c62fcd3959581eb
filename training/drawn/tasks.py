"""Loss and exact matches on drawn tasks, a packed batch in each step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from training.architecture import cast_weights
from training.drawn.forward import PackedForward
from training.drawn.packing import Limits, Packed, empty
from training.drawn.written import CELLS, LETTERS, NO_LETTER, UNKNOWN
from training.sequences import IGNORE

_COSINE_SCALE = 30.0
_NO_LETTER_WEIGHT = 0.05  # nine cells of ten show none


class DrawnLoss(NamedTuple):
    """Scalars of one batch.

    Attributes
    ----------
    answers : torch.Tensor
        Mean over the tokens of answers; a token of an answer of n tokens weighs n**-0.5, as in
        :func:`~training.objective.score_answers`.
    shown : torch.Tensor
        Mean over pieces of text on the pictures, see :func:`shown_loss`.
    letters : torch.Tensor
        Mean over cells of the pictures, see :class:`LetterReadout`.
    """

    answers: torch.Tensor
    shown: torch.Tensor
    letters: torch.Tensor


def shown_loss(
    visual_tokens: torch.Tensor, directions: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far visual tokens point away from the embedding of a piece of text that each shows.

    Cross entropy of cosines, as in contrastive training of towers with text (Radford et al. 2021, CLIP, section 2.3),
    here with the decoder's own embedding in place of a text encoder.

    Parameters
    ----------
    visual_tokens : torch.Tensor
        Shape (pieces, hidden).
    directions : torch.Tensor
        Rows of the embedding, each of length 1, (vocabulary, hidden).
    ids : torch.Tensor
        int64 of shape (pieces,), ``IGNORE`` where there is none.

    Returns
    -------
    tuple of torch.Tensor
        Mean loss, and share of pieces that the token points to more than to any other; scalars, 0 without pieces.
    """
    logits = _COSINE_SCALE * (F.normalize(visual_tokens, dim=-1) @ directions.T).float()
    count = (ids != IGNORE).sum().clamp(min=1)
    loss = F.cross_entropy(logits, ids, ignore_index=IGNORE, reduction="sum") / count
    return loss, (logits.detach().argmax(dim=-1) == ids).sum() / count


class LetterReadout(nn.Module):
    """Auxiliary linear readout of the letters in a visual token's cells; thrown away after training.

    Parameters
    ----------
    hidden : int
        Width of a visual token.
    """

    weight: torch.Tensor

    def __init__(self, hidden: int):
        super().__init__()
        self.linear = nn.Linear(hidden, CELLS * LETTERS)
        weight = torch.ones(LETTERS)
        weight[NO_LETTER] = _NO_LETTER_WEIGHT
        self.register_buffer("weight", weight)

    def forward(self, tokens: torch.Tensor, letters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross entropy over cells, and share of letters read correctly; scalars, 0 where no cell is known.

        Parameters
        ----------
        tokens : torch.Tensor
            Shape (n, hidden).
        letters : torch.Tensor
            uint8 of shape (n, cells).
        """
        logits = self.linear(tokens).view(-1, LETTERS).float()
        known = letters.flatten().long()
        known = known.where(known != UNKNOWN, IGNORE)
        weight = self.weight.float()
        total = F.cross_entropy(logits, known, weight, ignore_index=IGNORE, reduction="sum")
        weights = weight[known.clamp(min=0)] * (known != IGNORE)
        is_letter = known > NO_LETTER
        right = (is_letter & (logits.detach().argmax(dim=-1) == known)).sum()
        return total / weights.sum().clamp(min=1), right / is_letter.sum().clamp(min=1)


class DrawnTasks:
    """Batches on fixed buffers, so that a CUDA graph may hold the steps.

    Parameters
    ----------
    model : Qwen2_5_VLForConditionalGeneration
    batches : iterator of Packed
        Of numpy arrays, without an end.
    limits : Limits
    families : sequence of str
        In the order of their indices.
    ahead : int
        Steps that :meth:`load` loads for.
    weight : float
        Of the loss beside that of the scenes.
    compiled : bool

    Attributes
    ----------
    readout : LetterReadout
        To be trained beside the model while its loss counts.
    """

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        batches: Iterator[Packed],
        limits: Limits,
        families: Sequence[str],
        ahead: int,
        weight: float,
        compiled: bool = False,
    ):
        device = model.device
        self.weight, self._families, self._batches, self._ahead = weight, list(families), batches, ahead
        self._forward = PackedForward(model, limits, compiled)
        shapes = empty(limits, len(families))
        # Two sets on the host: one is filled while the other is still being copied.
        self._host = [
            Packed(*(torch.from_numpy(array).expand(ahead, *array.shape).clone() for array in shapes)) for _ in "ab"
        ]
        if device.type == "cuda":
            self._host = [Packed(*(tensor.pin_memory() for tensor in one)) for one in self._host]
            self._copied = [torch.cuda.Event() for _ in self._host]
        self._batch = Packed(*(tensor.to(device) for tensor in self._host[0]))
        self._turn, self._is_filled, self._waited = 0, False, 0.0
        self._hits, self._asked = (torch.zeros(len(families) + 1, device=device) for _ in "ab")
        self._pointed, self._read, self._steps = (torch.zeros((), device=device) for _ in range(3))
        hidden = model.config.text_config.hidden_size
        self.readout = cast_weights(LetterReadout(hidden).to(device), model.dtype)
        # As they begin: of the rows only those of the tokens of images are trained, which no picture shows.
        self._directions = F.normalize(model.get_input_embeddings().weight.detach(), dim=-1)

    def load(self) -> None:
        """Bring the next batches to the device."""
        self.fill()
        for there, here in zip(self._batch, self._host[self._turn], strict=True):
            there.copy_(here, non_blocking=True)
        if self._batch.ids.is_cuda:
            self._copied[self._turn].record()
        self._turn, self._is_filled = 1 - self._turn, False

    def fill(self) -> None:
        """Take the batches that :meth:`load` loads next, which may be done while the device is busy."""
        if self._is_filled:
            return
        if self._batch.ids.is_cuda:
            self._copied[self._turn].synchronize()
        started = time.monotonic()
        for index in range(self._ahead):
            for tensor, array in zip(self._host[self._turn], next(self._batches), strict=True):
                tensor[index].copy_(torch.from_numpy(array))
        self._waited += time.monotonic() - started
        self._is_filled = True

    def loss(self, index: int) -> DrawnLoss:
        """Losses in loaded batch ``index``."""
        batch = Packed(*(tensor[index] for tensor in self._batch))
        visual_tokens = self._forward.visual_tokens(batch)
        answers = self._answers_loss(batch, self._forward.decode(batch, visual_tokens))
        shown, pointed = shown_loss(visual_tokens[batch.shown_at], self._directions, batch.shown)
        letters, read = self.readout(visual_tokens, batch.letters)
        self._pointed += pointed
        self._read += read
        self._steps += 1
        return DrawnLoss(answers, shown, letters)

    def _answers_loss(self, batch: Packed, logits: torch.Tensor) -> torch.Tensor:
        targets, owners = batch.targets, batch.owners
        used = (targets != IGNORE).float()
        lengths = torch.zeros(batch.families.shape, device=used.device).index_add_(0, owners, used)
        weights = used * lengths[owners].clamp(min=1).rsqrt()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        wrong = used * (logits.detach().argmax(dim=-1) != targets)
        n_wrong = torch.zeros_like(lengths).index_add_(0, owners, wrong)
        asked = (lengths > 0).float()
        self._asked.index_add_(0, batch.families, asked)
        self._hits.index_add_(0, batch.families, asked * (n_wrong == 0))
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6)

    def read(self) -> dict[str, float]:
        """Shares since the last call: answers right, teacher-forced, by family; pieces and letters of shown text right.

        ``drawn_wait`` is the host's time for taking batches, in seconds.
        """
        hits, asked = self._hits.tolist(), self._asked.tolist()
        steps = max(float(self._steps), 1.0)
        seen = {"pieces": float(self._pointed) / steps, "letters": float(self._read) / steps}
        for tensor in (self._hits, self._asked, self._pointed, self._read, self._steps):
            tensor.zero_()
        right = {name: h / max(a, 1.0) for name, h, a in zip(self._families, hits, asked, strict=False)}
        waited, self._waited = self._waited, 0.0
        return right | seen | {"drawn_wait": waited}
