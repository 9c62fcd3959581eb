"""Conversations about one picture, in which some questions make sense behind the one before only."""

from __future__ import annotations

import dataclasses

from PIL import Image

from ..scenes import LAYOUTS, draw_scene
from .asking import ask
from .charts import draw_bars, draw_groups, draw_lines, draw_pie
from .documents import draw_form, draw_page, draw_receipt, draw_table
from .example import Drawing, Request, TaskFamily, Turn
from .grounds import GROUNDS, PHOTOGRAPHIC, ground_for, turn_of
from .screens import draw_window, questions_of

_DOCUMENTS = (draw_page, draw_form, draw_receipt, draw_table)
_CHARTS = (draw_bars, draw_lines, draw_pie, draw_groups)
_PLACES = (
    ("Is it in the left or right half?", ("left", "right"), 0),
    ("Is it in the top or bottom half?", ("top", "bottom"), 1),
)
_LEAST_TURNS, _MOST_TURNS = 2, 5


def _scene(request: Request) -> tuple[Image.Image, list[Turn]]:
    rng = request.rng
    ground = rng.choice([name for name in GROUNDS if name not in PHOTOGRAPHIC])
    scene = draw_scene(request.seed, LAYOUTS["square"], ground_for(ground, request.seed, request.split))
    turns = []
    for question in scene.questions:
        turn = turn_of(question)
        if question.task in ("number", "word", "colour") and turn.box is not None:
            text, words, axis = rng.choice(_PLACES)
            beyond = turn.box[axis] + turn.box[axis + 2] >= scene.image.size[axis]
            turn = dataclasses.replace(turn, follow=Turn(text, (words[beyond],), box=turn.box))
        turns.append(turn)
    return scene.image, turns


def _document(request: Request) -> tuple[Image.Image, list[Turn]]:
    return request.rng.choice(_DOCUMENTS)(request.rng, request.split)


def _chart(request: Request) -> tuple[Image.Image, list[Turn]]:
    return request.rng.choice(_CHARTS)(request.rng, request.split)


def _screen(request: Request) -> tuple[Image.Image, list[Turn]]:
    """A window; behind a question about the open menu comes one about its entries."""
    window = draw_window(request.rng, request.split)
    asked = questions_of(request, window)
    first = ask(request.rng, ("And what is its first entry?", "Which entry does it begin with?"), window.entries[0])
    opened = ask(
        request.rng, ("Which menu is open?", "Name the menu that is unfolded."), window.open_menu, follow=first
    )
    return window.image, [opened, *(turn for task in ("switch", "field", "tab", "button") for turn in asked[task])]


_DRAW = {"scene": _scene, "document": _document, "chart": _chart, "screen": _screen}


def _draw(request: Request) -> Drawing:
    """Two to five turns, or as many as are asked for; half of the conversations end on a question that says "it"."""
    image, questions = _DRAW[request.task](request)
    rng = request.rng
    count = request.turns if request.turns > 1 else rng.randint(_LEAST_TURNS, _MOST_TURNS)
    leading = [turn for turn in questions if turn.follow is not None]
    if not leading or rng.random() < 0.5:
        return (image,), tuple(rng.sample(questions, min(count, len(questions))))
    lead = rng.choice(leading)
    assert lead.follow is not None
    others = [turn for turn in questions if turn is not lead]
    return (image,), (*rng.sample(others, min(count - 2, len(others))), lead, lead.follow)


CHAT = TaskFamily("chat", tuple(_DRAW), _draw, max_new_tokens=48, read=frozenset({"document"}))
