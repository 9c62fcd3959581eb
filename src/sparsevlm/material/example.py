"""What every family of drawn tasks gives: pictures, and questions with their answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Turn:
    """A question with its answers.

    Attributes
    ----------
    question : str
    answers : tuple of str
        All that count as right; the first is the one to learn.
    metric : str
        How an answer is judged: ``"exact"``, ``"anls"``, ``"relaxed"`` or ``"iou"``.
    box : tuple of int or None
        What the question is about in pixels (left, top, right, bottom), where it is in one place.
    follow : Turn or None
        A question that makes sense right behind this one only, as it says "it".
    """

    question: str
    answers: tuple[str, ...]
    metric: str = "exact"
    box: Box | None = None
    follow: Turn | None = None


@dataclass(frozen=True)
class Example:
    """Pictures and a conversation about them.

    Attributes
    ----------
    family, task : str
    images : tuple of PIL images
    turns : tuple of Turn
        In the order in which they are asked.
    """

    family: str
    task: str
    images: tuple[Image.Image, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Request:
    """What a family is asked to draw.

    Attributes
    ----------
    task : str
    seed : int
    split : str
        ``"training"`` or ``"evaluation"``.
    turns : int
        Questions about the picture; fewer where a picture has no more.
    rng : random.Random
        The numbers of this example.
    """

    task: str
    seed: int
    split: str
    turns: int
    rng: random.Random

    def choose(self, questions: list[Turn]) -> tuple[Turn, ...]:
        """Some of the questions that a picture has, as many as are asked for."""
        return tuple(self.rng.sample(questions, min(self.turns, len(questions))))


Drawing = tuple[tuple[Image.Image, ...], tuple[Turn, ...]]


@dataclass(frozen=True)
class TaskFamily:
    """A family of tasks with the function that draws it.

    Attributes
    ----------
    name : str
    tasks : tuple of str
    draw : callable
        ``draw(request)`` gives images and turns.
    max_new_tokens : int
        Enough for the longest answer.
    photographic, read : frozenset of str
        Tasks that need photographs; tasks judged by ``"anls"``, which needs a package.
    """

    name: str
    tasks: tuple[str, ...]
    draw: Callable[[Request], Drawing]
    max_new_tokens: int = 24
    photographic: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
