"""Lines over years."""

from __future__ import annotations

import random

from PIL import Image

from ..asking import ask
from ..example import Turn
from ..splits import EVALUATION
from ..words import some
from .plot import COLOURS, apart, opened, some_colours

_MARKERS = "osD^v"


def draw_lines(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """One to three lines with a legend. Dashed lines are of evaluation only."""
    names = some(rng, "series", split, rng.randint(1, 3))
    first = rng.randint(1980, 2015)
    years = list(range(first, first + rng.randint(4, 8)))
    top = rng.choice((20, 40, 100, 200, 1000))
    table = {name: dict(zip(years, apart(rng, len(years), top), strict=True)) for name in names}
    colours = dict(zip(names, some_colours(rng, len(names)), strict=True))
    with opened(rng, split) as plot:
        style = "--" if split == EVALUATION and rng.random() < 0.5 else "-"
        marker = rng.choice(_MARKERS)
        for name, values in table.items():
            plot.axes.plot(
                years, list(values.values()), style, marker=marker, label=name, color=COLOURS[colours[name]], lw=2
            )
        plot.axes.set_xticks(years)
        plot.axes.tick_params(axis="x", labelrotation=40 if len(years) > 5 else 0)
        plot.axes.set_ylim(0, 1.3 * max(max(values.values()) for values in table.values()))
        plot.axes.legend(loc="upper center", ncols=3)
        image = plot.finish()
    return image, _questions(rng, table, colours)


def _questions(rng: random.Random, table: dict[str, dict[int, int]], colours: dict[str, str]) -> list[Turn]:
    years = list(next(iter(table.values())))
    questions = [
        ask(rng, ("How many lines are there?", "Count the lines in the chart."), str(len(table))),
        ask(rng, ("What is the first year on the axis?", "In which year does the chart begin?"), str(years[0])),
        ask(rng, ("What is the last year on the axis?", "In which year does the chart end?"), str(years[-1])),
    ]
    for name, values in table.items():
        best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        rises = "yes" if values[years[-1]] > values[years[0]] else "no"
        its_value = ask(rng, ("And what is its value in that year?",), str(values[best]), "relaxed")
        questions += [
            ask(rng, ("In which year is {name} highest?", "When does {name} peak?"), str(best), name=name,
                follow=its_value),
            ask(rng, ("In which year is {name} lowest?", "When is {name} at its lowest?"), str(worst), name=name),
            ask(rng, ("Is {name} higher at the end than at the beginning?", "Does {name} end above where it began?"),
                rises, name=name),
            ask(rng, ("What colour is the line of {name}?", "Which colour stands for {name}?"), colours[name],
                name=name),
            ask(rng, ("What does the {colour} line show?", "Which series is {colour}?"), name, colour=colours[name]),
        ]  # fmt: skip
        questions += [
            ask(rng, ("What is {name} in {year}?", "Which value does {name} have in {year}?"), str(value), "relaxed",
                name=name, year=year)
            for year, value in values.items()
        ]  # fmt: skip
    return questions
