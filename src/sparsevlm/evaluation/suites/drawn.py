"""Drawn tasks as suites: one for each family of :mod:`sparsevlm.material`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ...material import EVALUATION, FAMILIES, check_packages, draw
from ...scenes import HOLDOUT_SEEDS
from ..metrics.scores import check_metric
from .demo import DEFAULT_LIMIT, FIRST_SEED
from .suite import Row, Sample, chosen_tasks


class DrawnSuite:
    """Examples of one family from the part that is held out; a row's id is its seed.

    Parameters
    ----------
    name : str
        A name of :data:`sparsevlm.material.FAMILIES`.
    first_seed : int
        Seed of the first row.
    wanted : tuple of str or None
        The tasks that will be asked for; what they need must be installed.

    Raises
    ------
    ValueError
        If a wanted task does not exist, or the seed is not one of the held-out ones.
    ModuleNotFoundError
        If a package that pictures or scores come from is missing; the message has the pip line.
    """

    def __init__(self, name: str, first_seed: int = FIRST_SEED, wanted: tuple[str, ...] | None = None) -> None:
        family = FAMILIES[name]
        if first_seed not in HOLDOUT_SEEDS:
            raise ValueError(
                f"pictures of seed {first_seed} may have been trained on; the first row must be in "
                f"{HOLDOUT_SEEDS.start}..{HOLDOUT_SEEDS.stop - 1}."
            )
        self.name = name
        self.first_seed = first_seed
        self.tasks = family.tasks
        self.max_new_tokens = family.max_new_tokens
        self._wanted = chosen_tasks(self, wanted)
        check_packages(name, self._wanted, EVALUATION)
        if set(self._wanted) & family.read:
            check_metric("anls")

    def n_rows(self, task: str, limit: int | None) -> int:
        """Number of rows that :meth:`rows` yields: ``limit``, or :data:`~.demo.DEFAULT_LIMIT`."""
        return min(DEFAULT_LIMIT if limit is None else limit, HOLDOUT_SEEDS.stop - self.first_seed)

    def rows(self, task: str, limit: int | None) -> Iterator[Row]:
        """Rows of consecutive seeds."""
        for seed in range(self.first_seed, self.first_seed + self.n_rows(task, limit)):
            yield Row(str(seed), task, lambda seed=seed: self._sample(task, seed))  # type: ignore[misc]

    def fingerprint(self) -> str:
        """Hash of the first picture, questions and answers of every wanted task."""
        digest = hashlib.sha256()
        for task in self._wanted:
            sample = self._sample(task, self.first_seed)
            digest.update("\n".join([task, *sum(sample.history, ()), sample.question, *sample.answers]).encode())
            for image in sample.images:
                digest.update(image.tobytes())
        return digest.hexdigest()[:16]

    def _sample(self, task: str, seed: int) -> Sample:
        example = draw(self.name, task, seed, EVALUATION)
        *earlier, asked = example.turns
        history = tuple((turn.question, turn.answers[0]) for turn in earlier)
        return Sample(example.images, asked.question, asked.answers, asked.metric, history)
