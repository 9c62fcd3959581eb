"""What suites of drawn pictures share: a row is a seed that no training run has seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ...scenes import HOLDOUT_SEEDS
from .suite import Row, Sample

FIRST_SEED = 500_000
DEFAULT_LIMIT = 500


class SeededSuite:
    """Base of suites whose rows are drawn from held-out seeds; a row's id is its seed.

    Parameters
    ----------
    name : str
    tasks : tuple of str
    max_new_tokens : int
        Enough for the longest answer.
    first_seed : int
        Seed of the first row.

    Raises
    ------
    ValueError
        If the seed is not one of the held-out ones.
    """

    def __init__(self, name: str, tasks: tuple[str, ...], max_new_tokens: int, first_seed: int) -> None:
        if first_seed not in HOLDOUT_SEEDS:
            raise ValueError(
                f"pictures of seed {first_seed} may have been trained on; the first row must be in "
                f"{HOLDOUT_SEEDS.start}..{HOLDOUT_SEEDS.stop - 1}."
            )
        self.name, self.tasks, self.max_new_tokens, self.first_seed = name, tasks, max_new_tokens, first_seed

    def n_rows(self, task: str, limit: int | None) -> int:
        """Number of rows that :meth:`rows` yields: ``limit``, or :data:`DEFAULT_LIMIT`."""
        return min(DEFAULT_LIMIT if limit is None else limit, HOLDOUT_SEEDS.stop - self.first_seed)

    def rows(self, task: str, limit: int | None) -> Iterator[Row]:
        """Rows of consecutive seeds."""
        for seed in range(self.first_seed, self.first_seed + self.n_rows(task, limit)):
            yield Row(str(seed), task, lambda seed=seed: self.sample(task, seed))  # type: ignore[misc]

    def fingerprint(self) -> str:
        """Hash of the first picture, questions and answers of every task."""
        return self.fingerprint_of(self.tasks)

    def fingerprint_of(self, tasks: tuple[str, ...]) -> str:
        """The same of some tasks."""
        digest = hashlib.sha256()
        for task in tasks:
            sample = self.sample(task, self.first_seed)
            digest.update("\n".join([task, *sum(sample.history, ()), sample.question, *sample.answers]).encode())
            for image in sample.images:
                digest.update(image.tobytes())
        return digest.hexdigest()[:16]

    def sample(self, task: str, seed: int) -> Sample:
        """Draws the pictures and the question of a seed."""
        raise NotImplementedError
