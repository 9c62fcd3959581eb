"""Generated scenes with questions: the same code draws for training, evaluation and demos."""

from .questions import QuestionBatch, ask
from .render import cell_contents, digit_centres, object_boxes, render
from .scene import Box, Question, Scene, draw_scene
from .seeds import HOLDOUT_SEEDS, TRAINING_SEEDS, holdout_seeds, training_seeds
from .specification import SceneSpec, sample_specs
from .vocabulary import (
    ANSWER_OFFSET,
    ANSWER_TEXTS,
    COLOURS,
    DEFAULT_LAYOUT,
    QUESTION_TEXTS,
    SHAPES,
    TASKS,
    TEXT_OFFSET,
    Layout,
)

__all__ = [
    "ANSWER_OFFSET",
    "ANSWER_TEXTS",
    "COLOURS",
    "DEFAULT_LAYOUT",
    "HOLDOUT_SEEDS",
    "QUESTION_TEXTS",
    "SHAPES",
    "TASKS",
    "TEXT_OFFSET",
    "TRAINING_SEEDS",
    "Box",
    "Layout",
    "Question",
    "QuestionBatch",
    "Scene",
    "SceneSpec",
    "ask",
    "cell_contents",
    "digit_centres",
    "draw_scene",
    "holdout_seeds",
    "object_boxes",
    "render",
    "sample_specs",
    "training_seeds",
]
