"""Bars, upright or lying, single or in groups."""

from __future__ import annotations

import random

from PIL import Image

from ..asking import ask
from ..example import Turn
from ..words import MONTHS, some, word
from .plot import COLOURS, apart, opened, some_colours

_VALUE = (
    "What is the value of {name}?",
    "How high is the bar of {name}?",
    "Which value does {name} have?",
    "How much is {name}?",
)
_MOST = ("Which bar is the highest?", "What has the largest value?", "Which one is the maximum?")
_LEAST = ("Which bar is the lowest?", "What has the smallest value?", "Which one is the minimum?")
_COMPARE = ("Is {one} larger than {other}?", "Does {one} have a higher value than {other}?")


def draw_bars(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """A bar for each of some names."""
    names = some(rng, "city" if rng.random() < 0.5 else "department", split, rng.randint(3, 7))
    values = apart(rng, len(names), rng.choice((20, 40, 100, 200, 1000, 5000)))
    title, (colour,) = word(rng, "series", split), some_colours(rng, 1)
    with opened(rng, split) as plot:
        lying = rng.random() < 0.3
        if lying:
            drawn = plot.axes.barh(names, values, color=COLOURS[colour])
        else:
            drawn = plot.axes.bar(names, values, color=COLOURS[colour])
            plot.axes.tick_params(axis="x", labelrotation=35 if len(names) > 4 else 0)
        if rng.random() < 0.5:
            plot.axes.bar_label(drawn)
        plot.axes.set_title(title)
        image = plot.finish()
    ranked = sorted(names, key=lambda name: -values[names.index(name)])
    its_value = ask(rng, ("And what is its value?", "How much is that?"), str(max(values)), "relaxed")
    one, other = rng.sample(names, 2)
    larger = values[names.index(one)] > values[names.index(other)]
    questions = [
        ask(rng, ("What is the title of the chart?", "What does the chart show?"), title),
        ask(rng, ("What colour are the bars?", "Which colour do the bars have?"), colour),
        ask(rng, ("How many bars are there?", "Count the bars."), str(len(names))),
        ask(rng, _MOST, ranked[0], follow=its_value),
        ask(rng, _LEAST, ranked[-1]),
        ask(rng, _COMPARE, "yes" if larger else "no", one=one, other=other),
    ]
    for name, value in zip(names, values, strict=True):
        questions.append(ask(rng, _VALUE, str(value), "relaxed", name=name))
    return image, questions


def draw_groups(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """Groups of bars whose colours a legend explains."""
    series = some(rng, "series", split, rng.randint(2, 4))
    start = rng.randint(0, 8)
    groups = [month[:3] for month in MONTHS[start : start + rng.randint(2, 4)]]
    top = rng.choice((20, 40, 100, 200, 1000))
    table = {name: apart(rng, len(groups), top) for name in series}
    colours = dict(zip(series, some_colours(rng, len(series)), strict=True))
    with opened(rng, split) as plot:
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(table.items()):
            places = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
            plot.axes.bar(places, values, width, label=name, color=COLOURS[colours[name]])
        plot.axes.set_xticks(range(len(groups)), groups)
        plot.axes.set_ylim(0, 1.35 * max(max(values) for values in table.values()))  # room for the legend
        plot.axes.legend(ncols=2, loc="upper center")
        image = plot.finish()
    return image, _group_questions(rng, table, groups, colours)


def _group_questions(
    rng: random.Random, table: dict[str, list[int]], groups: list[str], colours: dict[str, str]
) -> list[Turn]:
    questions = [
        ask(rng, ("How many series does the legend name?", "How many colours of bars are there?"), str(len(table))),
        ask(rng, ("How many groups of bars are there?", "Count the groups along the axis."), str(len(groups))),
    ]
    for name, colour in colours.items():
        value = dict(zip(groups, table[name], strict=True))
        best = max(groups, key=value.__getitem__)
        its_value = ask(rng, ("And how high is its bar there?",), str(value[best]), "relaxed")
        questions += [
            ask(rng, ("What colour stands for {name}?", "Which colour are the bars of {name}?"), colour, name=name),
            ask(rng, ("What do the {colour} bars show?", "Which series is {colour}?"), name, colour=colour),
            ask(rng, ("In which group is {name} highest?", "When is {name} at its largest?"), best, name=name,
                follow=its_value),
        ]  # fmt: skip
        questions += [
            ask(rng, ("What is the value of {name} in {group}?", "How much is {name} in {group}?"), str(value[group]),
                "relaxed", name=name, group=group)
            for group in groups
        ]  # fmt: skip
    return questions
