"""Which pictures a batch holds: groups of samples of one layout, packed one behind the other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsevlm.scenes import (
    LAYOUTS,
    PAIR,
    PAIR_LAYOUT,
    SINGLE_TASKS,
    TRAINING_SEEDS,
    Layout,
    QuestionBatch,
    SceneSpec,
    ask,
    ask_pair,
    sample_specs,
)
from training.pixels import MERGE, PATCH

TOKEN = PATCH * MERGE  # pixels
_SEEDS_PER_RUN = 2**32


@dataclass(frozen=True)
class Group:
    """Samples of equal shape.

    Attributes
    ----------
    layouts : tuple of Layout
        One per picture of a sample.
    count : int
        Samples in a batch.
    """

    layouts: tuple[Layout, ...]
    count: int

    @property
    def is_pair(self) -> bool:
        """Whether a sample has two pictures."""
        return len(self.layouts) > 1

    @property
    def n_images(self) -> int:
        """Pictures in a batch."""
        return self.count * len(self.layouts)

    @property
    def tokens(self) -> int:
        """Visual tokens of one picture."""
        return self.layouts[0].width * self.layouts[0].height // TOKEN**2


@dataclass(frozen=True)
class GroupBatch:
    """The scenes and questions of a group.

    Attributes
    ----------
    specs : tuple of SceneSpec
        One per picture of a sample, each of ``count`` scenes.
    questions : QuestionBatch
    """

    specs: tuple[SceneSpec, ...]
    questions: QuestionBatch


def parse_mix(mix: str) -> tuple[Group, ...]:
    """Groups of a text like ``"square:32,huge:1,pair:8"``: names of ``LAYOUTS`` or ``pair``, and samples per batch.

    Raises
    ------
    ValueError
        If a name is unknown or a number is missing.
    """
    counts = parse_counts(mix, (*LAYOUTS, PAIR), "mix must look like 'square:32,pair:8'")
    return tuple(
        Group((PAIR_LAYOUT, PAIR_LAYOUT) if name == PAIR else (LAYOUTS[name],), count) for name, count in counts
    )


def parse_counts(text: str, known: Sequence[str], wanted: str) -> list[tuple[str, int]]:
    """Names with numbers of a text like ``"square:32,pair:8"``.

    Raises
    ------
    ValueError
        If a name is not ``known`` or a number is missing; the message begins with ``wanted``.
    """
    counts = []
    for part in text.split(","):
        name, _, count = part.partition(":")
        if name not in known or not count.isdigit() or int(count) == 0:
            raise ValueError(f"{wanted} with names out of {', '.join(known)}, got {part!r}")
        counts.append((name, int(count)))
    return counts


def first_seed(run: int) -> int:
    """Seed of the first sample of a run; those of runs lie apart."""
    return TRAINING_SEEDS.start + run * _SEEDS_PER_RUN


def draw_group(group: Group, seeds: torch.Tensor, task_table: torch.Tensor, n_questions: int) -> GroupBatch:
    """Scenes and questions of a group.

    Parameters
    ----------
    seeds : torch.Tensor
        int64 of shape (count,).
    task_table : torch.Tensor
        int64 of shape (n,): tasks of single pictures, drawn uniformly from; pairs have their own.
    """
    specs = tuple(sample_specs(seeds, layout, picture) for picture, layout in enumerate(group.layouts))
    if group.is_pair:
        return GroupBatch(specs, ask_pair(*specs, n_questions))
    tasks = task_table[specs[0].draws.integers("task", 0, task_table.shape[0], n_questions)]
    return GroupBatch(specs, ask(specs[0], tasks))


def task_table(shares: dict[str, int], device: torch.device) -> torch.Tensor:
    """Each task of a single picture as often as its share says."""
    return torch.tensor([i for i, task in enumerate(SINGLE_TASKS) for _ in range(shares[task])], device=device)
