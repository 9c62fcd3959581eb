"""Tables of numbers."""

from __future__ import annotations

import random

from PIL import Image

from ..asking import ask
from ..example import Turn
from ..splits import EVALUATION
from ..words import MONTHS, some, word
from .sheet import Sheet

_CELL = (
    "What is the value for {row} in {column}?",
    "Which number stands in the row {row} and the column {column}?",
    "Read the {column} entry of {row}.",
    "How much is it for {row} in {column}?",
)
_MOST = ("Which row has the largest value in {column}?", "In {column}, which row is highest?", "Who leads in {column}?")
_LEAST = ("Which row has the smallest value in {column}?", "In {column}, which row is lowest?")


def draw_table(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """A table below a heading and above some text, and questions about its cells."""
    sheet = Sheet(rng, split)
    title = f"{word(rng, 'series', split)} by {rng.choice(('city', 'region', 'branch'))}"
    sheet.heading(title)
    width = max(round(sheet.font(0.9).getlength("September")) + 16, 78)
    n_columns = max(2, min(6, (sheet.width - 150) // width))
    n_rows = max(3, min(12, (sheet.room - 3 * sheet.text_size) // (2 * sheet.text_size) - 1))
    rows = some(rng, "city", split, rng.randint(3, n_rows))
    start = rng.randint(0, 12 - n_columns)
    columns = list(MONTHS[start : start + rng.randint(2, n_columns)])
    cells = [rng.sample(range(10, 9990), len(rows)) for _ in columns]
    _rule(sheet, rows, columns, cells)
    sheet.fill(rng.uniform(0.0, 1.0))
    questions = [ask(rng, ("What is the table about?", "Read the heading of the table."), title, "anls")]
    for column, values in zip(columns, cells, strict=True):
        for row, value in zip(rows, values, strict=True):
            questions.append(ask(rng, _CELL, str(value), "anls", row=row, column=column))
        best, worst = rows[values.index(max(values))], rows[values.index(min(values))]
        its_value = ask(rng, ("And what is its value there?",), str(max(values)), "anls")
        questions.append(ask(rng, _MOST, best, "anls", column=column, follow=its_value))
        questions.append(ask(rng, _LEAST, worst, "anls", column=column))
    return sheet.finish(), questions


def _rule(sheet: Sheet, rows: list[str], columns: list[str], cells: list[list[int]]) -> None:
    """Draw the cells, and go below them: in training some within lines, in evaluation some with shaded rows."""
    size, face = sheet.text_size, sheet.font(0.9)
    step, first = 2 * size, max(150, sheet.width - 110 * len(columns))
    width = (sheet.width - first) // len(columns)
    ruled = sheet.rng.random() < 0.6
    for i, name in enumerate(("", *rows)):
        top = sheet.y + i * step
        if ruled and sheet.split == EVALUATION and i % 2:
            sheet.draw.rectangle((sheet.left, top, sheet.left + sheet.width, top + step), fill=(205, 210, 220))
        middle = top + step // 2
        sheet.line(name, face, x=sheet.left + 6, y=middle, anchor="lm")
        for j, column in enumerate(columns):
            text = column if i == 0 else str(cells[j][i - 1])
            sheet.line(text, face, x=sheet.left + first + (j + 1) * width - 6, y=middle, anchor="rm")
    bottom = sheet.y + (len(rows) + 1) * step
    if ruled and sheet.split != EVALUATION:
        for i in range(len(rows) + 2):
            y = sheet.y + i * step
            sheet.draw.line((sheet.left, y, sheet.left + sheet.width, y), fill=sheet.ink)
        for x in (sheet.left, *(sheet.left + first + j * width for j in range(len(columns))), sheet.left + sheet.width):
            sheet.draw.line((x, sheet.y, x, bottom), fill=sheet.ink)
    else:
        sheet.draw.line((sheet.left, sheet.y + step, sheet.left + sheet.width, sheet.y + step), fill=sheet.ink, width=2)
    sheet.y = bottom + size
