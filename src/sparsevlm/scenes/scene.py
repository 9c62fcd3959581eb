"""One scene as an image with questions, for people and for demos."""

from dataclasses import dataclass

import torch
from PIL import Image

from .questions import QuestionBatch, ask
from .render import cell_contents, object_boxes, render
from .specification import SceneSpec, sample_specs
from .vocabulary import ANSWER_TEXTS, DEFAULT_LAYOUT, QUESTION_TEXTS, TASKS, Layout

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
    """A drawn scene: RGB image, one question per task, and the seed that made both."""

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
        raise ValueError(f"no question of task {task!r}; tasks are {', '.join(TASKS)}")


def draw_scene(seed: int, layout: Layout = DEFAULT_LAYOUT) -> Scene:
    """Draw the scene of a seed on the CPU.

    Parameters
    ----------
    seed : int
        In [0, 2**48). Seeds below one million are never used in training.

    Raises
    ------
    ValueError
        If the seed is out of range.
    """
    if not 0 <= seed < 2**48:
        raise ValueError(f"seed must lie in [0, 2**48), got {seed}")
    spec = sample_specs(torch.tensor([seed]), layout)
    questions = ask(spec, torch.arange(len(TASKS))[None])
    pixels = render(spec)[0].permute(1, 2, 0).numpy()
    return Scene(Image.fromarray(pixels, "RGB"), _describe(spec, questions), seed)


def _describe(spec: SceneSpec, questions: QuestionBatch) -> tuple[Question, ...]:
    """Questions of the first scene in words and pixels."""
    kinds, _ = cell_contents(spec)
    boxes = object_boxes(spec, kinds)[0].tolist()
    described = []
    for column, task in enumerate(questions.tasks[0].tolist()):
        cells = questions.cells[0, column].nonzero().flatten().tolist()
        described.append(
            Question(
                task=TASKS[task],
                text=QUESTION_TEXTS[int(questions.text_ids[0, column])],
                answer=ANSWER_TEXTS[int(questions.answer_ids[0, column])],
                box=tuple(_pixel_box(boxes[cell], cell, spec.layout) for cell in cells),
            )
        )
    return tuple(described)


def _pixel_box(box: list[int], cell: int, layout: Layout) -> Box:
    top, left, height, width = box
    top, left = top + cell // layout.cols * layout.cell, left + cell % layout.cols * layout.cell
    return left, top, left + width, top + height
