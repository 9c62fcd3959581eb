"""Small pages of any words, for training only: what is read on them is never one of a few known names."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

from PIL import Image

from sparsevlm.material import TRAINING, Example, Turn
from sparsevlm.material.documents.sheet import LEADING, Sheet, wrap
from sparsevlm.material.splits import generator
from sparsevlm.material.words import date

READING = "reading"
_COLUMNS, _ROWS = (8, 22), (5, 16)  # of visual tokens
_MOST_ENTRIES = 14
_WHOLE_LINES = 8  # a text of so many lines is read as a whole


def draw_reading(words: Sequence[str], seed: int, turns: int) -> Example:
    """A page and questions that are answered by reading it, a pure function of the arguments."""
    rng = generator(READING, seed)
    name = rng.choice(list(_DRAW))
    image, questions = _DRAW[name](rng, words)
    return Example(READING, name, (image,), tuple(rng.sample(questions, min(turns, len(questions)))))


def _sheet(rng: random.Random) -> Sheet:
    sheet = Sheet(rng, TRAINING, grid=(rng.randint(*_COLUMNS), rng.randint(*_ROWS)))
    sheet.margin = sheet.y = rng.randint(6, 24)
    if rng.random() < 0.3:
        sheet.text_size = rng.randint(sheet.text_size, 34)
    return sheet


def _text(rng: random.Random, words: Sequence[str], sheet: Sheet) -> list[str]:
    """Lines that fit on the sheet, the first of them a whole word at least."""
    chosen = [_term(rng, words) for _ in range(rng.randint(1, 40))]
    leading = round(LEADING * sheet.text_size)
    return wrap(" ".join(chosen), sheet.font(), sheet.width)[: max(1, sheet.room // leading)]


def _term(rng: random.Random, words: Sequence[str]) -> str:
    """A word in one of several cases, or a number, an amount or a day."""
    kind = rng.random()
    if kind < 0.75:
        word = rng.choice(words)
        return rng.choice((word, word, word.capitalize(), word.upper()))
    if kind < 0.85:
        return str(rng.randint(0, 10 ** rng.randint(1, 6)))
    if kind < 0.93:
        return f"{rng.randint(0, 999)}.{rng.randint(0, 99):02d}"
    return date(rng)


def _lines(rng: random.Random, words: Sequence[str]) -> tuple[Image.Image, list[Turn]]:
    """Running text."""
    sheet = _sheet(rng)
    lines, face = _text(rng, words, sheet), sheet.font()
    for line in lines:
        sheet.line(line, face)
        sheet.y += round(LEADING * sheet.text_size)
    questions = [Turn("Read the first line.", (lines[0],)), Turn("Read the last line.", (lines[-1],))]
    if len(lines) <= _WHOLE_LINES:
        questions += [Turn("Read the text.", (" ".join(lines),)), Turn("What is written here?", (" ".join(lines),))]
    questions += [Turn(f"Read line {i}.", (line,)) for i, line in enumerate(lines, start=1)]
    known = " ".join(lines).split()
    for word, after in itertools.pairwise(known):
        if known.count(word) == 1:
            questions.append(Turn(f"Which word comes after {word}?", (after,)))
    return sheet.finish(), questions


def _entries(rng: random.Random, words: Sequence[str]) -> tuple[Image.Image, list[Turn]]:
    """Labels with values beside them, as on forms and receipts."""
    sheet = _sheet(rng)
    face, leading = sheet.font(), round(rng.uniform(1.3, 2.2) * sheet.text_size)
    n_rows = min(max(1, sheet.room // leading), _MOST_ENTRIES, len(words))
    labels = rng.sample(words, n_rows)
    values = [" ".join(_term(rng, words) for _ in range(rng.choice((1, 1, 2)))) for _ in labels]
    sign, right = rng.choice((":", "", " -")), rng.random() < 0.5
    for label, value in zip(labels, values, strict=True):
        sheet.line(label.capitalize() + sign, face)
        x = sheet.left + sheet.width if right else sheet.left + round(0.45 * sheet.width)
        sheet.line(value, face, x=x, anchor="ra" if right else "la")
        sheet.y += leading
    questions = []
    for label, value in zip(labels, values, strict=True):
        questions.append(Turn(rng.choice((f"What is the {label}?", f"Read the entry for {label}.")), (value,)))
        questions.append(Turn(f"What stands beside {label.capitalize()}?", (value,)))
        if values.count(value) == 1:
            questions.append(Turn(f"Which label has the value {value}?", (label.capitalize(),)))
    return sheet.finish(), questions


_DRAW: dict[str, Callable[[random.Random, Sequence[str]], tuple[Image.Image, list[Turn]]]] = {
    "lines": _lines,
    "entries": _entries,
}
