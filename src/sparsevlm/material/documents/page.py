"""Pages of running text, with facts among sentences that say nothing asked about."""

from __future__ import annotations

import random

from PIL import Image

from ..asking import ask
from ..example import Turn
from ..splits import EVALUATION
from ..words import company, date, filler, person, with_article, word
from .sheet import LEADING, Font, Sheet, wrap

_COLUMN_GAP = 26
_FULL = (0.55, 0.95)  # of the page
_TITLES = (
    "The New {topic} of {city}",
    "{city} Opens Its {topic}",
    "A {topic} for {city}",
    "Report on the {topic} in {city}",
)


def draw_page(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """An article and questions about its facts."""
    sheet = Sheet(rng, split)
    title, facts, questions = _article(rng, split)
    sheet.heading(title)
    author, day = person(rng, split), date(rng)
    sheet.line(f"By {author}, {day}", sheet.font(0.9))
    sheet.y += round(2.2 * sheet.text_size)
    _set(sheet, facts, _n_columns(rng, split, sheet.width))
    questions += [
        ask(
            rng,
            ("What is the title of this page?", "Read the heading.", "Which headline does the page carry?"),
            title,
            "anls",
        ),
        ask(
            rng,
            ("Who wrote this?", "Who is the author of the article?", "Name the writer of this text."),
            author,
            "anls",
        ),
        ask(rng, ("When was the article written?", "What date stands below the headline?"), day, "anls"),
    ]
    return sheet.finish(), questions


def draw_reading(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """A page of numbered sections, whose headings and first lines are to be read."""
    sheet = Sheet(rng, split)
    title = rng.choice(_TITLES).format(topic=word(rng, "topic", split), city=word(rng, "city", split))
    sheet.heading(title)
    questions = [ask(rng, ("Read the title.", "What does the largest line say?"), title, "anls")]
    face, number = sheet.font(), 0
    while sheet.room > 7 * sheet.text_size and number < 9:
        number += 1
        heading = f"{word(rng, 'topic', split)} of {word(rng, 'city', split)}"
        sheet.heading(f"{number}. {heading}", 1.25)
        lines = wrap(" ".join(filler(rng, split, rng.randint(2, 6))), face, sheet.width)
        for line in lines:
            if sheet.room < 2 * sheet.text_size:
                break
            sheet.line(line, face)
            sheet.y += round(LEADING * sheet.text_size)
        sheet.y += sheet.text_size
        named = {"number": number}
        questions += [
            ask(
                rng,
                ("What is the heading of section {number}?", "Read the title of section {number}."),
                heading,
                "anls",
                **named,
            ),
            ask(rng, ("Read the first line of the text in section {number}.",), lines[0], "anls", **named),
        ]
    last = ask(rng, ("How many numbered sections does this page have?", "Count the sections."), str(number), "exact")
    return sheet.finish(), [*questions, last]


def _article(rng: random.Random, split: str) -> tuple[str, list[str], list[Turn]]:
    """Headline, sentences with facts, questions."""
    topic, city = word(rng, "topic", split), word(rng, "city", split)
    title = rng.choice(_TITLES).format(topic=topic, city=city)
    designer, opener, builder = person(rng, split), person(rng, split), company(rng, split)
    opened, cost, rooms = date(rng), rng.randint(2, 98), rng.randint(12, 480)
    job = word(rng, "job", split)
    named = {"topic": topic.lower(), "city": city}
    facts = [
        f"The {topic.lower()} was opened on {opened} by {opener}.",
        f"It was designed by {designer}, who had worked as {with_article(job)} before.",
        f"In all it cost {cost} million dollars and has {rooms} rooms.",
        f"The builders were {builder}.",
    ]
    questions = [
        ask(rng, ("Who designed the {topic}?", "By whom was the {topic} designed?", "Name the designer."), designer,
            "anls", follow=ask(rng, ("What had that person worked as before?",), job, "anls"), **named),
        ask(rng, ("Who opened the {topic}?", "Name the person who opened the {topic}."), opener, "anls",
            follow=ask(rng, ("And on which day?",), opened, "anls"), **named),
        ask(rng, ("When was the {topic} opened?", "On what day was the {topic} opened?"), opened, "anls", **named),
        ask(rng, ("Who built the {topic}?", "Which firm were the builders?"), builder, "anls", **named),
        ask(rng, ("How many rooms does the {topic} have?", "What is the number of rooms?"), str(rooms),
            "anls", **named),
        ask(rng, ("How much did the {topic} cost?", "What was the cost?"),
            (f"{cost} million dollars", f"{cost} million", f"${cost} million"), "anls", **named),
        ask(rng, ("In which city is the {topic}?", "Which city is this about?"), city, "anls", **named),
    ]  # fmt: skip
    return title, facts, questions


def _n_columns(rng: random.Random, split: str, width: int) -> int:
    """One or two columns; three are of evaluation only."""
    most = max(1, min(3 if split == EVALUATION else 2, width // 260))
    return rng.randint(1, most)


def _set(sheet: Sheet, facts: list[str], n_columns: int) -> None:
    """Set the facts, in any order and among other sentences, in columns that they fill in part."""
    rng, face = sheet.rng, sheet.font()
    width, leading = (sheet.width - (n_columns - 1) * _COLUMN_GAP) // n_columns, round(LEADING * sheet.text_size)
    per_column = sheet.room // leading
    n_lines = rng.uniform(*_FULL) * per_column * n_columns
    least = len(_lines(facts, face, width))
    others = filler(rng, sheet.split, 10)
    each = len(_lines(others, face, width)) / len(others)
    others += filler(rng, sheet.split, max(0, round((n_lines - least) / each) - len(others)))
    sentences = list(others)
    for fact in rng.sample(facts, len(facts)):
        sentences.insert(rng.randint(0, len(sentences)), fact)
    lines = _lines(sentences, face, width)
    while others and len(lines) > per_column * n_columns:  # what is asked about stays
        sentences.remove(others.pop())
        lines = _lines(sentences, face, width)
    # Columns of even length where there are several, as in print.
    per_column = per_column if n_columns == 1 else min(per_column, -(-len(lines) // n_columns) + 1)
    for i, line in enumerate(lines):
        column, row = divmod(i, per_column)
        sheet.line(line, face, x=sheet.left + column * (width + _COLUMN_GAP), y=sheet.y + row * leading)


def _lines(sentences: list[str], face: Font, width: int) -> list[str]:
    """Lines of paragraphs of five sentences, with an empty one behind each."""
    parts = [" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]
    return [line for part in parts for line in [*wrap(part, face, width), ""]]
