"""The bundled generated scenes as a suite: no files, no network, as many rows as are asked for."""

from __future__ import annotations

from ...scenes import LAYOUTS, PAIR, TASKS, draw_example
from .seeded import FIRST_SEED, SeededSuite
from .suite import Sample

_DEFAULT_LAYOUT = "square"
_METRICS = {"box": "iou"}
_LONGEST = 24  # tokens of a list of all cards


class DemoSuite(SeededSuite):
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

    def __init__(self, name: str = "demo", first_seed: int = FIRST_SEED) -> None:
        layout = name.removeprefix("demo").removeprefix("-") or _DEFAULT_LAYOUT
        if layout not in LAYOUTS:
            others = ", ".join(f"demo-{layout}" for layout in LAYOUTS if layout != _DEFAULT_LAYOUT)
            raise ValueError(f"there is no suite {name!r}; of bundled scenes there are demo, {others}.")
        self.layout = layout
        tasks = tuple(task for task in TASKS if task != PAIR or layout == _DEFAULT_LAYOUT)
        super().__init__(name if layout != _DEFAULT_LAYOUT else "demo", tasks, _LONGEST, first_seed)

    def sample(self, task: str, seed: int) -> Sample:
        """Draws a scene and its question."""
        example = draw_example(task, seed, self.layout)
        return Sample(example.images, example.question, (example.answer,), _METRICS.get(task, "exact"))
