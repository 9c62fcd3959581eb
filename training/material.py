"""What the steps of a run learn from: pictures, chats and labels, drawn for several steps at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparsevlm.scenes import SceneSpec, render
from training.groups import Group, GroupBatch, draw_group
from training.objective import place_labels, token_labels
from training.sequences import SequenceBuilder, Sequences


@dataclass(frozen=True)
class Material:
    """Samples of one group; all tensors begin with the samples.

    Attributes
    ----------
    pixels : torch.Tensor
        uint8 of shape (samples, pictures, 3, height, width).
    sequences : Sequences
    tasks : torch.Tensor
        int64 of shape (samples, n_questions).
    shown, places : torch.Tensor
        Labels of :func:`token_labels` and :func:`place_labels`, (samples, pictures, tokens, things).
    """

    pixels: torch.Tensor
    sequences: Sequences
    tasks: torch.Tensor
    shown: torch.Tensor
    places: torch.Tensor

    def part(self, rows: slice) -> Material:
        """Some of the samples."""
        sequences = self.sequences
        return Material(
            self.pixels[rows],
            Sequences(
                sequences.input_ids[rows], sequences.targets[rows], sequences.owner[rows], sequences.complete[rows]
            ),
            self.tasks[rows],
            self.shown[rows],
            self.places[rows],
        )


def draw_material(
    group: Group, seeds: torch.Tensor, task_table: torch.Tensor, builder: SequenceBuilder, n_questions: int, tail: int
) -> Material:
    """Draw one sample per seed.

    Drawing takes thousands of small kernels however few scenes are drawn, so it pays to draw for many steps.
    """
    batch = draw_group(group, seeds, task_table, n_questions)
    return Material(
        pixels=_by_picture(render, batch),
        sequences=builder(batch.questions, tail),
        tasks=batch.questions.tasks,
        shown=_by_picture(token_labels, batch),
        places=_by_picture(place_labels, batch),
    )


def _by_picture(make: Callable[[SceneSpec], torch.Tensor], batch: GroupBatch) -> torch.Tensor:
    return torch.stack([make(spec) for spec in batch.specs], dim=1)
