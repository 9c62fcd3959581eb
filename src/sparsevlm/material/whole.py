"""Questions about whole pictures, where most of the tokens carry the answer."""

from __future__ import annotations

import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..scenes import COLOUR_RGB, COLOURS
from .asking import ask
from .example import Drawing, Request, TaskFamily, Turn
from .photos import crop
from .splits import EVALUATION, sizes
from .surfaces import PATTERNS, Colour, Size, gradient, noise, pattern, strokes, texture

# Columns and rows of visual tokens of 28 pixels; each size is of one split.
GRIDS = sizes(((18, 16), (22, 18), (26, 20), (34, 28)), range(12, 37), range(12, 37), range(256, 1025))
_TOKEN = 28
_YES_NO = ("", " Answer yes or no.", " Please answer yes or no.")
_LARGE = 0.08  # of the picture
_DARK, _LIGHT = (25.0, 70.0), (175.0, 225.0)  # mean grey level
_COLOURED = 28.0  # mean difference of the channels


def _size(request: Request) -> Size:
    columns, rows = request.rng.choice(GRIDS[request.split])
    return columns * _TOKEN, rows * _TOKEN


def _yes_no(rng: random.Random, wordings: tuple[str, ...], yes: bool, **named: object) -> Turn:
    text = rng.choice(wordings).format(**named) + rng.choice(_YES_NO)
    return Turn(text, ("yes" if yes else "no",))


def _two_colours(rng: random.Random, split: str) -> tuple[str, str]:
    """Ground and ink; one pair in four is held out for evaluation."""
    pairs = [(one, other) for one in range(len(COLOURS)) for other in range(len(COLOURS)) if one != other]
    one, other = rng.choice([(a, b) for a, b in pairs if ((a * 3 + b * 5) % 4 == 3) == (split == EVALUATION)])
    return COLOURS[one], COLOURS[other]


def _shade(rng: random.Random, colour: str) -> Colour:
    red, green, blue = (max(0, min(255, part + rng.randint(-12, 12))) for part in COLOUR_RGB[COLOURS.index(colour)])
    return red, green, blue


def _patterned(request: Request) -> tuple[Image.Image, str, str, str]:
    """A picture with its pattern, ground and ink."""
    rng = request.rng
    ground, ink = _two_colours(rng, request.split)
    kind, size = rng.choice(PATTERNS), _size(request)
    period, angle = rng.uniform(30, 110), rng.uniform(0, math.pi)
    image = pattern(rng, size, kind, _shade(rng, ground), _shade(rng, ink), period, angle)
    return image, kind, ground, ink


def _pattern(request: Request) -> tuple[Image.Image, list[Turn]]:
    image, kind, ground, ink = _patterned(request)
    rng = request.rng
    other = rng.choice([one for one in PATTERNS if one != kind])
    absent = rng.choice([one for one in COLOURS if one not in (ground, ink)])
    asked, colour = rng.choice(((kind, True), (other, False))), rng.choice(((ink, True), (absent, False)))
    wordings = ("Is the picture covered with {kind}?", "Are there {kind} all over the picture?")
    return image, [
        ask(rng, ("What pattern covers the picture: stripes, checks, dots, waves or bricks?",
                  "Stripes, checks, dots, waves or bricks: which are all over the picture?"), kind),
        _yes_no(rng, wordings, asked[1], kind=asked[0]),
        _yes_no(rng, ("Is {colour} one of the two colours of the pattern?", "Is there any {colour} in the pattern?"),
                colour[1], colour=colour[0]),
    ]  # fmt: skip


def _caption(request: Request) -> tuple[Image.Image, list[Turn]]:
    image, kind, ground, ink = _patterned(request)
    answers = [f"{ink} {kind} on {ground}", f"{ground} with {ink} {kind}", f"{ink} {kind} on a {ground} ground"]
    if kind in ("stripes", "checks", "waves"):  # of which either colour may be the ground
        answers.append(f"{ground} {kind} on {ink}")
    wordings = (
        "Describe the picture in the way of: red dots on blue.",
        "Give a caption such as: yellow stripes on green.",
        "What does the picture show? Say it like: pink waves on cyan.",
    )
    return image, [Turn(request.rng.choice(wordings), tuple(answers))]


def areas(rng: random.Random, size: Size) -> tuple[Image.Image, dict[str, float]]:
    """Large areas of colour; the share of the picture that each colour has, 0 for those that are absent.

    No share is in between: below ``_LARGE`` there is only none at all.
    """
    while True:
        chosen = rng.sample(range(len(COLOURS)), rng.randint(3, 5))
        labels = Image.new("L", size, chosen[0])
        draw = ImageDraw.Draw(labels)
        for label in chosen[1:]:
            width, height = (round(side * rng.uniform(0.25, 0.7)) for side in size)
            left, top = rng.randint(0, size[0] - width), rng.randint(0, size[1] - height)
            form = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            form((left, top, left + width, top + height), fill=label)
        found = np.asarray(labels)
        shares = np.bincount(found.ravel(), minlength=len(COLOURS)) / found.size
        ranked = np.sort(shares)
        if (shares[chosen] >= _LARGE).all() and ranked[-1] >= 1.5 * ranked[-2]:
            colours = np.array([_shade(rng, colour) for colour in COLOURS], np.uint8)
            return Image.fromarray(colours[found]), dict(zip(COLOURS, shares.tolist(), strict=True))


def _areas(request: Request) -> tuple[Image.Image, dict[str, float]]:
    image, shares = areas(request.rng, _size(request))
    strokes(request.rng, image, request.rng.randint(0, 12))
    return image, shares


def _colour(request: Request) -> tuple[Image.Image, list[Turn]]:
    image, shares = _areas(request)
    rng, main = request.rng, max(shares, key=shares.__getitem__)
    wordings = ("What is the main colour of the picture?", "Which colour covers most of the picture?")
    n_colours = sum(share > 0 for share in shares.values())
    return image, [
        ask(rng, wordings, main),
        ask(rng, ("How many colours have a large area?", "Count the colours of the large areas."), str(n_colours)),
    ]


def _presence(request: Request) -> tuple[Image.Image, list[Turn]]:
    image, shares = _areas(request)
    rng = request.rng
    questions = []
    for is_there in (True, False):
        colour = rng.choice([colour for colour, share in shares.items() if (share > 0) == is_there])
        wordings = ("Is there a large {colour} area?", "Does the picture have a large {colour} area in it?")
        questions.append(_yes_no(rng, wordings, is_there, colour=colour))
    return image, questions


def _light(request: Request) -> tuple[Image.Image, list[Turn]]:
    """A surface made dark or light, by the mean of its grey levels."""
    rng, size = request.rng, _size(request)
    surface = rng.choice((noise, gradient, texture))(rng, size)
    is_dark = rng.random() < 0.5
    target = rng.uniform(*(_DARK if is_dark else _LIGHT))
    values = np.asarray(surface, np.float32)
    mean = float(values.mean())
    # Towards black or white, which keeps every value in range.
    moved = values * (target / mean) if target < mean else 255 - (255 - values) * ((255 - target) / (255 - mean))
    image = Image.fromarray(np.clip(np.rint(moved), 0, 255).astype(np.uint8))
    return image, [
        ask(rng, ("Is the picture dark or light?", "Dark or light: how is this picture on the whole?"),
            "dark" if is_dark else "light"),
        _yes_no(rng, ("Is this a dark picture?", "Is the picture dark on the whole?"), is_dark),
        _yes_no(rng, ("Is this a light picture?", "Is the picture bright on the whole?"), not is_dark),
    ]  # fmt: skip


def _photo(request: Request) -> tuple[Image.Image, list[Turn]]:
    """A photograph, in colour or not, or something drawn."""
    rng, size = request.rng, _size(request)
    is_photo = rng.random() < 0.5
    if is_photo:
        image = crop(rng, request.split, size)
        grey = rng.random() < 0.5 or _colourfulness(np.asarray(image, np.float32)) < _COLOURED
    else:
        image, _ = areas(rng, size) if rng.random() < 0.5 else (_patterned(request)[0], {})
        grey = rng.random() < 0.5
    if grey:
        image = image.convert("L").convert("RGB")
    return image, [
        ask(rng, ("Is this a photograph or a drawing?", "A photograph or a drawing: what is this?"),
            "photograph" if is_photo else "drawing"),
        _yes_no(rng, ("Is this a photograph?", "Was this taken with a camera?"), is_photo),
        _yes_no(rng, ("Is this picture in colour?", "Does the picture have any colour?"), not grey),
    ]  # fmt: skip


def _colourfulness(values: NDArray[np.float32]) -> float:
    return float((values.max(axis=2) - values.min(axis=2)).mean())


_DRAW = {
    "pattern": _pattern,
    "colour": _colour,
    "presence": _presence,
    "light": _light,
    "photo": _photo,
    "caption": _caption,
}


def _draw(request: Request) -> Drawing:
    image, questions = _DRAW[request.task](request)
    return (image,), request.choose(questions)


WHOLE = TaskFamily("whole", tuple(_DRAW), _draw, photographic=frozenset({"photo"}))
