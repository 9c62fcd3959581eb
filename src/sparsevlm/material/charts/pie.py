"""Pies, and rings in evaluation."""

from __future__ import annotations

import itertools
import random

from PIL import Image

from ..asking import ask
from ..example import Turn
from ..splits import EVALUATION
from ..words import some, word
from .plot import COLOURS, opened, some_colours


def draw_pie(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """Shares of a whole, with their names beside them or in a legend."""
    names = some(rng, "product" if rng.random() < 0.5 else "department", split, rng.randint(3, 5))
    shares = _shares(rng, len(names))
    colours = dict(zip(names, some_colours(rng, len(names), dark=False), strict=True))
    title, in_legend, told = word(rng, "series", split), rng.random() < 0.5, rng.random() < 0.7
    with opened(rng, split) as plot:
        plot.grid_axis = None
        hole = {"width": 0.45} if split == EVALUATION and rng.random() < 0.5 else {}
        plot.axes.pie(
            shares,
            labels=None if in_legend else names,
            colors=[COLOURS[colours[name]] for name in names],
            autopct="%d%%" if told else None,
            pctdistance=0.75,
            startangle=rng.randint(0, 359),
            wedgeprops={"edgecolor": "white", **hole},
        )
        if in_legend:
            plot.figure.legend(names, loc="outside lower center", ncols=2)
        plot.axes.set_title(title)
        image = plot.finish()
    share = dict(zip(names, shares, strict=True))
    largest, smallest = max(names, key=share.__getitem__), min(names, key=share.__getitem__)
    its_share = ask(rng, ("And what share is it, in percent?",), _percent(share[largest]), "relaxed")
    questions = [
        ask(rng, ("What is the title of the chart?", "What is the heading above the pie?"), title),
        ask(rng, ("How many slices are there?", "Into how many parts is it cut?"), str(len(names))),
        ask(rng, ("Which slice is the largest?", "What has the largest share?"), largest, follow=its_share),
        ask(rng, ("Which slice is the smallest?", "What has the smallest share?"), smallest),
    ]
    for name in names:
        questions += [
            ask(rng, ("What colour is {name}?", "Which colour is the slice of {name}?"), colours[name], name=name),
            ask(rng, ("What does the {colour} slice stand for?", "Which one is {colour}?"), name, colour=colours[name]),
        ]
        # Only what is written can be read to one in twenty.
        if told:
            wordings = ("What share does {name} have, in percent?", "How many percent is {name}?")
            questions.append(ask(rng, wordings, _percent(share[name]), "relaxed", name=name))
    return image, questions if told else [_without_follow(one) for one in questions]


def _without_follow(turn: Turn) -> Turn:
    return Turn(turn.question, turn.answers, turn.metric, turn.box)


def _percent(share: int) -> tuple[str, str]:
    return str(share), f"{share}%"


def _shares(rng: random.Random, count: int) -> list[int]:
    """Whole percentages that make a hundred; no two nearer than three, none below six."""
    while True:
        cuts = sorted(rng.sample(range(6, 95), count - 1))
        shares = [after - before for before, after in zip([0, *cuts], [*cuts, 100], strict=True)]
        ranked = sorted(shares)
        if ranked[0] >= 6 and all(b - a >= 3 for a, b in itertools.pairwise(ranked)):
            return shares
