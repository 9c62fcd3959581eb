"""The scenes on grounds that are full themselves: photographs, textures, noise, clutter, crowds; and faint ones."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..scenes import (
    CLUTTER,
    COLOUR_RGB,
    FULL,
    LAYOUTS,
    NOTHING,
    SINGLE_TASKS,
    Ground,
    Question,
    SceneSpec,
    cell_contents,
    draw_scene,
    picture_boxes,
)
from .example import Box, Drawing, Request, TaskFamily, Turn
from .photos import crop
from .splits import EVALUATION, SEEDS, generator
from .surfaces import collage, gradient, muted, noise, strokes, texture

_METRICS = {"box": "iou"}
_TRAINING_LAYOUTS = ("square", "square", "wide", "tall", "small")
_TRIES = 12
_APART = 150  # sum of the differences of three channels
_CROWD = 70
# An arrow, a bar and an L, in a square from -1 to 1.
_ANGULAR: tuple[list[tuple[float, float]], ...] = (
    [(-1, -0.3), (0.2, -0.3), (0.2, -0.8), (1, 0), (0.2, 0.8), (0.2, 0.3), (-1, 0.3)],
    [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
    [(-1, -1), (-0.4, -1), (-0.4, 0.4), (1, 0.4), (1, 1), (-1, 1)],
)
_GAP = 4  # pixels between an object and the crowd
_SCENES_APART = 60_000  # seeds from a ground to the next
PHOTOGRAPHIC = frozenset({"photograph", "collage"})


def _clutter(rng: random.Random, spec: SceneSpec, split: str) -> Image.Image:
    image = gradient(rng, _size(spec))
    strokes(rng, image, rng.randint(60, 110))
    return image


def _crowded(rng: random.Random, spec: SceneSpec, split: str) -> Image.Image:
    """Solid grey shapes of kinds that nothing is asked about, in every free place."""
    image = Image.new("RGB", _size(spec), muted(rng, 60, 160, 15))
    draw, taken = ImageDraw.Draw(image), _occupied(spec)
    for _ in range(12 * _CROWD):
        side = rng.randint(16, 60)
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
        box = (left, top, left + side, top + side)
        if len(taken) >= _CROWD or any(_meets(box, other) for other in taken):
            continue
        taken.append(box)
        draw.polygon(_outline(rng, box), fill=muted(rng, 20, 235, 8))
    return image


def _outline(rng: random.Random, box: Box) -> list[tuple[float, float]]:
    """A pentagon, hexagon or octagon, an arrow, a bar or an L."""
    left, top, right, _ = box
    side, turn = right - left, rng.uniform(0, 2 * math.pi)
    corners = rng.choice((5, 6, 8, 0, 0))
    if corners:
        angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
        unit = [(math.cos(angle), math.sin(angle)) for angle in angles]
    else:
        unit = rng.choice(_ANGULAR)
    return [(left + side * (1 + x) / 2, top + side * (1 + y) / 2) for x, y in unit]


def _occupied(spec: SceneSpec) -> list[Box]:
    """Boxes of everything that stands in a scene, clutter included."""
    kinds, _ = cell_contents(spec)
    boxes = picture_boxes(spec)[0].tolist()
    return [tuple(box) for box, kind in zip(boxes, kinds[0].tolist(), strict=True) if kind >= 0]


def _meets(one: Box, other: Box) -> bool:
    return (
        one[0] < other[2] + _GAP and other[0] < one[2] + _GAP and one[1] < other[3] + _GAP and other[1] < one[3] + _GAP
    )


def _size(spec: SceneSpec) -> tuple[int, int]:
    return spec.layout.width, spec.layout.height


_PAINTERS: dict[str, Callable[[random.Random, SceneSpec, str], Image.Image]] = {
    "noise": lambda rng, spec, split: noise(rng, _size(spec)),
    "gradient": lambda rng, spec, split: gradient(rng, _size(spec)),
    "texture": lambda rng, spec, split: texture(rng, _size(spec)),
    "photograph": lambda rng, spec, split: crop(rng, split, _size(spec)),
    "collage": lambda rng, spec, split: collage(rng, _size(spec), split),
    "clutter": _clutter,
    "crowded": _crowded,
}
FAINT = "faint"
GROUNDS = (*_PAINTERS, FAINT)


def ground_for(name: str, seed: int, split: str) -> Callable[[SceneSpec], Ground]:
    """What makes a ground of a kind for a scene.

    Parameters
    ----------
    name : str
        One of ``GROUNDS``.
    seed : int
    split : str
        Whose photographs are taken.

    Returns
    -------
    callable
        Of a :class:`~sparsevlm.scenes.SceneSpec` of one scene. Of several grounds the first is taken on which every
        object stands out by its colour, or the last where none is so.
    """
    rng = generator("grounds", name, seed, split)
    if name == FAINT:
        opacity = rng.randint(3 * FULL // 10, FULL // 2)
        return lambda spec: Ground(opacity=opacity)

    def make(spec: SceneSpec) -> Ground:
        for _ in range(_TRIES):
            image = _PAINTERS[name](rng, spec, split)
            if stands_out(spec, image):
                break
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        return Ground(pixels)

    return make


def stands_out(spec: SceneSpec, image: Image.Image) -> bool:
    """Tells whether the colour of each card and shape is unlike what lies under it on average."""
    kinds, colours = cell_contents(spec)
    pixels = np.asarray(image, np.int64)
    things = zip(picture_boxes(spec)[0].tolist(), kinds[0].tolist(), colours[0].tolist(), strict=True)
    for (left, top, right, bottom), kind, colour in things:
        if kind in (NOTHING, CLUTTER):
            continue
        under = pixels[top:bottom, left:right].reshape(-1, 3).mean(axis=0)
        if np.abs(under - np.array(COLOUR_RGB[colour])).sum() < _APART:
            return False
    return True


def scene_seed(name: str, seed: int, split: str) -> int:
    """Seed of the scene on a ground, in the split.

    Each ground has scenes of its own, so that questions on several of them are as many draws as they look.
    """
    seeds = SEEDS[split]
    return seeds[(seeds.index(seed) + _SCENES_APART * GROUNDS.index(name)) % len(seeds)]


def _draw(request: Request, name: str, kind: str) -> Drawing:
    """A scene on a ground; the first question is of a kind, and each seed has one of every other kind."""
    layout = "square" if request.split == EVALUATION else request.rng.choice(_TRAINING_LAYOUTS)
    seed = scene_seed(name, request.seed, request.split)
    scene = draw_scene(seed, LAYOUTS[layout], ground_for(name, request.seed, request.split))
    first = scene.question(kind)
    others = [question for question in scene.questions if question.task != kind]
    asked = [first, *request.rng.sample(others, min(request.turns - 1, len(others)))]
    return (scene.image,), tuple(turn_of(one) for one in asked)


def turn_of(question: Question) -> Turn:
    """A question of a scene as a turn."""
    box = question.box[0] if len(question.box) == 1 else None
    return Turn(question.text, (question.answer,), _METRICS.get(question.task, "exact"), box)


def _family_on(name: str) -> TaskFamily:
    """The family of one ground, whose tasks are the kinds of questions."""

    def draw(request: Request) -> Drawing:
        return _draw(request, name, request.task)

    photographic = frozenset(SINGLE_TASKS) if name in PHOTOGRAPHIC else frozenset[str]()
    return TaskFamily(f"grounds-{name}", SINGLE_TASKS, draw, photographic=photographic)


def _draw_any(request: Request) -> Drawing:
    """A task is a ground; the kinds of questions follow each other from seed to seed."""
    return _draw(request, request.task, SINGLE_TASKS[request.seed % len(SINGLE_TASKS)])


ALL_GROUNDS = TaskFamily("grounds", GROUNDS, _draw_any, photographic=PHOTOGRAPHIC)
EACH_GROUND = tuple(_family_on(name) for name in GROUNDS)
