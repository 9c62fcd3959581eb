"""The bundled generated scenes as a suite: no files, no network, as many rows as are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ...scenes import HOLDOUT_SEEDS, LAYOUTS, PAIR, TASKS, draw_example
from .suite import Row, Sample

FIRST_SEED = 500_000
DEFAULT_LIMIT = 500
_DEFAULT_LAYOUT = "square"
_METRICS = {"box": "iou"}


class DemoSuite:
    """Fresh scenes of one layout; a row's id is its seed, which no training run has seen.

    Parameters
    ----------
    name : str
        ``"demo"`` (448 × 448 pixels, 256 visual tokens), or ``"demo-<layout>"`` for another layout. Pairs of pictures
        have a layout of their own and are asked in ``"demo"`` only.
    first_seed : int
        Seed of the first row.

    Raises
    ------
    ValueError
        If there is no such layout, or the seed is not one of the held-out ones.
    """

    max_new_tokens = 24  # a list of all cards is the longest answer

    def __init__(self, name: str = "demo", first_seed: int = FIRST_SEED) -> None:
        layout = name.removeprefix("demo").removeprefix("-") or _DEFAULT_LAYOUT
        if layout not in LAYOUTS:
            others = ", ".join(f"demo-{layout}" for layout in LAYOUTS if layout != _DEFAULT_LAYOUT)
            raise ValueError(f"there is no suite {name!r}; of bundled scenes there are demo, {others}.")
        if first_seed not in HOLDOUT_SEEDS:
            raise ValueError(
                f"scenes of seed {first_seed} may have been trained on; the first row must be in "
                f"{HOLDOUT_SEEDS.start}..{HOLDOUT_SEEDS.stop - 1}."
            )
        self.name = name if layout != _DEFAULT_LAYOUT else "demo"
        self.layout = layout
        self.first_seed = first_seed
        self.tasks = tuple(task for task in TASKS if task != PAIR or layout == _DEFAULT_LAYOUT)

    def n_rows(self, task: str, limit: int | None) -> int:
        """Number of rows that :meth:`rows` yields: ``limit``, or :data:`DEFAULT_LIMIT`."""
        return min(DEFAULT_LIMIT if limit is None else limit, HOLDOUT_SEEDS.stop - self.first_seed)

    def rows(self, task: str, limit: int | None) -> Iterator[Row]:
        """Rows of consecutive seeds."""
        for seed in range(self.first_seed, self.first_seed + self.n_rows(task, limit)):
            yield Row(str(seed), task, lambda seed=seed: self._sample(task, seed))  # type: ignore[misc]

    def fingerprint(self) -> str:
        """Hash of every task's first picture, question and answer."""
        digest = hashlib.sha256()
        for task in self.tasks:
            sample = self._sample(task, self.first_seed)
            digest.update("\n".join([task, sample.question, *sample.answers]).encode())
            for image in sample.images:
                digest.update(image.tobytes())
        return digest.hexdigest()[:16]

    def _sample(self, task: str, seed: int) -> Sample:
        example = draw_example(task, seed, self.layout)
        return Sample(example.images, example.question, (example.answer,), _METRICS.get(task, "exact"))
