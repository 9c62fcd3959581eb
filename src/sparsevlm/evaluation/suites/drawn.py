"""Drawn tasks as suites: one for each family of :mod:`sparsevlm.material`."""

from __future__ import annotations

from ...material import EVALUATION, FAMILIES, check_packages, draw
from ..metrics.scores import check_metric
from .seeded import FIRST_SEED, SeededSuite
from .suite import Sample, chosen_tasks


class DrawnSuite(SeededSuite):
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
        super().__init__(name, family.tasks, family.max_new_tokens, first_seed)
        self._wanted = chosen_tasks(self, wanted)
        check_packages(name, self._wanted, EVALUATION)
        if set(self._wanted) & family.read:
            check_metric("anls")

    def fingerprint(self) -> str:
        """Hash of the first picture, questions and answers of every wanted task."""
        return self.fingerprint_of(self._wanted)

    def sample(self, task: str, seed: int) -> Sample:
        """Draws a picture and the turns about it, of which the last is asked."""
        example = draw(self.name, task, seed, EVALUATION)
        *earlier, asked = example.turns
        history = tuple((turn.question, turn.answers[0]) for turn in earlier)
        return Sample(example.images, asked.question, asked.answers, asked.metric, history)
