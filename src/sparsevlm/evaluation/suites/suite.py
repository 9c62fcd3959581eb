"""Suites of an evaluation: rows of tasks, loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


def storable(text: str) -> str:
    """A text that UTF-8 can hold: halves of characters (lone surrogates), which it cannot, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Sample:
    """A loaded row.

    Attributes
    ----------
    images : tuple of PIL images
        In the order in which the prompt shows them, all before the question.
    question : str
    answers : tuple of str
        Every answer that counts; the ``vqa`` metric takes one per annotator.
    metric : str
        A name of :data:`sparsevlm.evaluation.metrics.scores.METRICS`.
    history : tuple of (str, str)
        Questions asked before, the images before the first of them, and the right answers to them.
    """

    images: tuple[Image.Image, ...]
    question: str
    answers: tuple[str, ...]
    metric: str
    history: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """One row before it is loaded.

    Attributes
    ----------
    id : str
        Unique within its task.
    task : str
    load : callable
        Returns the :class:`Sample`; raises ``ValueError`` or ``OSError`` that names the row and the remedy where
        there is none.
    """

    id: str
    task: str
    load: Callable[[], Sample]


class Suite(Protocol):
    """A named set of tasks.

    Attributes
    ----------
    name : str
        Part of the run folder's name and of every stored row.
    tasks : tuple of str
    max_new_tokens : int
        Enough for the longest answer.
    """

    @property
    def name(self) -> str: ...

    @property
    def tasks(self) -> tuple[str, ...]: ...

    @property
    def max_new_tokens(self) -> int: ...

    def n_rows(self, task: str, limit: int | None) -> int:
        """Number of rows that :meth:`rows` yields."""
        ...

    def rows(self, task: str, limit: int | None) -> Iterator[Row]:
        """The first ``limit`` rows of a task (all of them for ``None``), always in the same order."""
        ...

    def fingerprint(self) -> str:
        """A short text that differs where the data differ."""
        ...


def chosen_tasks(suite: Suite, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The tasks to run, in the suite's order.

    Raises
    ------
    ValueError
        If a wanted task does not exist; the message lists those that do.
    """
    if wanted is None:
        return suite.tasks
    if unknown := [task for task in wanted if task not in suite.tasks]:
        raise ValueError(
            f"suite {suite.name} has no task {', '.join(map(repr, unknown))}; it has {', '.join(suite.tasks)}."
        )
    return tuple(task for task in suite.tasks if task in wanted)
