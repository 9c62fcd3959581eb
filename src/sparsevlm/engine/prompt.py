"""A prompt on the host: what a request asks, but for its pictures."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import ModelAdapter
from ..runtime.planning import plan_samples
from ..runtime.request import Request, StageRecord


@dataclass(frozen=True)
class Prompt:
    """Tokens of a batch, on the host.

    Attributes
    ----------
    ids : Tensor of shape (batch, q_len), int64
    positions : Tensor of shape (3, batch, q_len), int64
    feature_rows : Tensor of shape (batch, q_len), int64
        Row of the vision tower's output, images before videos, that stands for a visual token; -1 for other tokens.
    n_features : int
        Rows that the tower has to give.
    kept : Tensor of shape (n_kept,), int64, or None
        Rows that the tower gives, ascending, where it computes some only: the others have row -1.
    """

    ids: Tensor
    positions: Tensor
    feature_rows: Tensor
    n_features: int
    kept: Tensor | None = None

    @classmethod
    def of(
        cls, adapter: ModelAdapter, ids: Tensor, positions: Tensor, kinds: Collection[str], copies: int = 1
    ) -> Prompt:
        """Read a prompt that brings images of ``kinds`` ("image", "video"), its rows in groups of ``copies`` equal ones
        that share them."""
        once = torch.full_like(ids[::copies], -1)
        so_far = 0
        for kind, modality in adapter.modalities.items():
            if kind in kinds:
                found = ids[::copies] == modality.token_id
                number = int(found.sum())
                once[found] = torch.arange(so_far, so_far + number)
                so_far += number
        return cls(ids, positions, once.repeat_interleave(copies, dim=0), so_far)

    def only(self, kept: Tensor) -> Prompt:
        """The same where the tower computes these rows only."""
        new = torch.full((self.n_features,), -1)
        new[kept] = torch.arange(kept.shape[0])
        visual = self.feature_rows >= 0
        rows = self.feature_rows.clone()
        rows[visual] = new[self.feature_rows[visual]]
        return Prompt(self.ids, self.positions, rows, kept.shape[0], kept)

    @property
    def next_positions(self) -> Tensor:
        """Of the first new token, of shape (3, batch)."""
        return self.positions[:, :, -1] + 1

    def embeddings(self, adapter: ModelAdapter, features: Tensor) -> Tensor:
        """Of shape (batch, q_len, hidden_size), on the device of ``features``."""
        device = features.device
        embeds: Tensor = adapter.decoder.embed(self.ids.to(device))
        rows = self.feature_rows.flatten()
        visual = (rows >= 0).nonzero()[:, 0]
        flat = embeds.flatten(0, 1)
        flat[visual.to(device)] = features[rows[visual].to(device)].to(flat.dtype)
        return flat.view_as(embeds)


def leave_out(adapter: ModelAdapter, request: Request, prompt: Prompt) -> None:
    """Leave out of a request what the vision tower does not compute, and plan with what is left.

    The budgets stay what they are, averages over all layers in the tokens of the whole picture.
    """
    for b, sample in enumerate(request.samples):
        n_in = sample.visual.shape[0]
        sample.keep_only((prompt.feature_rows[b, sample.visual] >= 0).nonzero()[:, 0])
        if n_in:
            sample.add_stage(StageRecord(-1, n_in, None, None, kept=sample.alive))
    plan_samples(adapter, request, prompt.ids)
