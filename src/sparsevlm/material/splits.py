"""Training and evaluation, kept apart by seeds, words, fonts, layouts and photographs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ..scenes import HOLDOUT_SEEDS, TRAINING_SEEDS

TRAINING, EVALUATION = "training", "evaluation"
SEEDS = {TRAINING: TRAINING_SEEDS, EVALUATION: HOLDOUT_SEEDS}


def check_seed(seed: int, split: str) -> None:
    """Refuse a split that does not exist, and a seed of another one.

    Raises
    ------
    ValueError
        With what there is.
    """
    if split not in SEEDS:
        raise ValueError(f"there is no split {split!r}; there are {', '.join(SEEDS)}.")
    if seed not in SEEDS[split]:
        allowed = SEEDS[split]
        raise ValueError(f"seeds of {split} lie in [{allowed.start}, {allowed.stop}), got {seed}.")


def generator(*key: object) -> random.Random:
    """Random numbers of a key, the same on every machine."""
    return random.Random("/".join(map(str, key)))


def arrays(rng: random.Random) -> np.random.RandomState:
    """Random arrays that follow from where ``rng`` stands; of the legacy kind, whose numbers are frozen."""
    return np.random.RandomState(rng.getrandbits(32))


def part(values: Sequence[str], split: str) -> tuple[str, ...]:
    """The values of a split: every fourth is held out for evaluation, the others are for training."""
    return tuple(value for i, value in enumerate(values) if (i % 4 == 3) == (split == EVALUATION))


def sizes(
    held_out: tuple[tuple[int, int], ...], columns: range, rows: range, tokens: range
) -> dict[str, tuple[tuple[int, int], ...]]:
    """Sizes of pictures by split: those held out for evaluation, and every other for training.

    Parameters
    ----------
    held_out : tuple of (int, int)
        Columns and rows of visual tokens.
    columns, rows, tokens : range
        How many of each a picture for training has; neither side is more than twice as long as the other.
    """
    every = ((wide, high) for wide in columns for high in rows if wide * high in tokens)
    training = (size for size in every if size not in held_out and max(size) <= 2 * min(size))
    return {TRAINING: tuple(training), EVALUATION: held_out}
