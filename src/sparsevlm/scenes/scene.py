"""Scenes as images with questions, for people, demos and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image

from .questions import QuestionBatch, ask, ask_pair
from .render import PLAIN, Ground, picture_boxes, render
from .specification import SceneSpec, sample_specs
from .vocabulary import (
    DEFAULT_LAYOUT,
    LAYOUTS,
    NO_PIECE,
    PAIR,
    PAIR_LAYOUT,
    PIECES,
    QUESTION_TEXTS,
    SINGLE_TASKS,
    TASKS,
    Layout,
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Question:
    """A question about one scene.

    Attributes
    ----------
    task : str
        One of ``TASKS``.
    text, answer : str
        As a user would type and expect them.
    box : tuple of Box
        Pixel boxes (left, top, right, bottom) of the objects that the question is about; empty if there is none,
        as in "Is there a green ring?" with the answer "no".
    """

    task: str
    text: str
    answer: str
    box: tuple[Box, ...]


@dataclass(frozen=True)
class Scene:
    """A drawn scene: RGB image, one question per task about a single picture, and the seed that made both."""

    image: Image.Image
    questions: tuple[Question, ...]
    seed: int

    def question(self, task: str) -> Question:
        """The question of a task.

        Raises
        ------
        ValueError
            If there is no such task.
        """
        for question in self.questions:
            if question.task == task:
                return question
        raise ValueError(f"no question of task {task!r}; tasks are {', '.join(SINGLE_TASKS)}")


@dataclass(frozen=True)
class Example:
    """One question with the picture, or the two pictures, that it is about."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str


def draw_scene(
    seed: int, layout: Layout = DEFAULT_LAYOUT, ground: Callable[[SceneSpec], Ground] | None = None
) -> Scene:
    """Draw the scene of a seed on the CPU.

    Parameters
    ----------
    seed : int
        In [0, 2**48). Seeds below one million are never used in training.
    layout : Layout
        Grid of the picture.
    ground : callable, optional
        Makes the ground from the scene, a batch of one; without it the scene has a plain one.

    Raises
    ------
    ValueError
        If the seed is out of range.
    """
    spec = sample_specs(_checked_seed(seed), layout)
    questions = ask(spec, torch.arange(len(SINGLE_TASKS))[None])
    return Scene(_image(spec, PLAIN if ground is None else ground(spec)), _describe(spec, questions), seed)


def draw_example(task: str, seed: int, layout: str = "square") -> Example:
    """Draw the picture of a seed (two for ``"pair"``) and ask the task's question.

    Parameters
    ----------
    task : str
        One of ``TASKS``.
    seed : int
        In [0, 2**48). Seeds below one million are never used in training.
    layout : str
        A name of ``LAYOUTS``; pairs have a layout of their own.

    Raises
    ------
    ValueError
        If task, seed or layout do not exist.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}; tasks are {', '.join(TASKS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; layouts are {', '.join(LAYOUTS)}")
    seeds = _checked_seed(seed)
    if task == PAIR:
        specs = [sample_specs(seeds, PAIR_LAYOUT, picture) for picture in range(2)]
        questions = ask_pair(specs[0], specs[1], 1)
    else:
        specs = [sample_specs(seeds, LAYOUTS[layout])]
        questions = ask(specs[0], torch.tensor([[TASKS.index(task)]]))
    text = QUESTION_TEXTS[int(questions.text_ids[0, 0])]
    return Example(tuple(_image(spec) for spec in specs), text, _answer(questions, 0))


def _checked_seed(seed: int) -> torch.Tensor:
    if not 0 <= seed < 2**48:
        raise ValueError(f"seed must lie in [0, 2**48), got {seed}")
    return torch.tensor([seed])


def _image(spec: SceneSpec, ground: Ground = PLAIN) -> Image.Image:
    return Image.fromarray(render(spec, ground)[0].permute(1, 2, 0).numpy(), "RGB")


def _answer(questions: QuestionBatch, column: int) -> str:
    pieces = questions.pieces[0, column].tolist()
    return "".join(PIECES[piece] for piece in pieces if piece != NO_PIECE)


def _describe(spec: SceneSpec, questions: QuestionBatch) -> tuple[Question, ...]:
    """Questions of the first scene in words and pixels."""
    boxes = picture_boxes(spec)[0].tolist()
    return tuple(
        Question(
            task=task,
            text=QUESTION_TEXTS[int(questions.text_ids[0, column])],
            answer=_answer(questions, column),
            box=tuple(tuple(boxes[cell]) for cell in questions.cells[0, column].nonzero().flatten().tolist()),
        )
        for column, task in enumerate(SINGLE_TASKS)
    )
