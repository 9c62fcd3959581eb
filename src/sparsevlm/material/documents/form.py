"""Forms that somebody has filled in."""

from __future__ import annotations

import random

from PIL import Image

from ..asking import ask
from ..example import Box, Turn
from ..fonts import FONTS, font
from ..splits import EVALUATION
from ..words import company, date, person, word
from .sheet import Font, Sheet

_FIELD = (
    "What is written in the field {label}?",
    "What is the {label}?",
    "Read the entry for {label}.",
    "Which {label} does the form give?",
)
_BOX = ("Is the box {label} ticked?", "Is there a tick beside {label}?", "Has {label} been ticked?")
_BOXES = (
    "Newsletter",
    "Parking",
    "Invoice by post",
    "Vegetarian meal",
    "First visit",
    "Insurance",
    "Overnight stay",
    "Guide",
)
_TITLES = ("Registration", "Application", "Order Form", "Membership", "Travel Request", "Booking")


def draw_form(rng: random.Random, split: str) -> tuple[Image.Image, list[Turn]]:
    """A form and questions about its fields and its boxes to tick."""
    sheet = Sheet(rng, split)
    title = rng.choice(_TITLES)
    sheet.heading(title)
    sheet.line(f"No. {(number := str(rng.randint(10_000, 99_999)))}", sheet.font(0.9))
    sheet.y += round(2 * sheet.text_size)
    questions = [ask(rng, ("What is the number of this form?", "Read the form number."), number, "anls")]
    # Labels above their fields are of evaluation only.
    above = split == EVALUATION and rng.random() < 0.5
    hand = font(rng.choice(FONTS[split]), sheet.text_size)
    for label, value in _entries(rng, split):
        height = round(sheet.text_size * (3.4 if above else 2.4))
        if sheet.room < height + 4 * sheet.text_size:
            break
        box = _field(sheet, label, value, hand, above)
        sheet.y += height
        questions.append(ask(rng, _FIELD, value, "anls", label=label.lower(), box=box))
    questions += _tick_boxes(sheet)
    sheet.y += 3 * sheet.text_size
    sheet.fill(rng.uniform(0.0, 1.0))
    return sheet.finish(), questions


def _entries(rng: random.Random, split: str) -> list[tuple[str, str]]:
    """Labels with values, in any order."""
    given, surname, city = word(rng, "given", split), word(rng, "surname", split), word(rng, "city", split)
    entries = [
        ("First name", given),
        ("Last name", surname),
        ("Date of birth", date(rng)),
        ("Street", f"{rng.randint(1, 199)} {word(rng, 'street', split)}"),
        ("City", city),
        ("Postal code", str(rng.randint(10_000, 99_999))),
        ("Telephone", f"0{rng.randint(100, 999)} {rng.randint(100_000, 999_999)}"),
        ("Employer", company(rng, split)),
        ("Department", word(rng, "department", split)),
        ("Occupation", word(rng, "job", split)),
        ("Contact person", person(rng, split)),
        ("Number of guests", str(rng.randint(1, 60))),
    ]
    return rng.sample(entries, rng.randint(7, len(entries)))


def _field(sheet: Sheet, label: str, value: str, hand: Font, above: bool) -> Box:
    """One field with its label beside or above it; the box that the value stands in."""
    size = sheet.text_size
    x = sheet.left if above else sheet.left + round(0.38 * sheet.width)
    y = sheet.y + (round(1.3 * size) if above else 0)
    sheet.line(label + ("" if above else ":"), sheet.font(0.85 if above else 1.0))
    frame = (x, y, sheet.left + sheet.width, y + round(1.7 * size))
    if above:
        sheet.draw.rectangle(frame, outline=sheet.ink)
    else:
        sheet.draw.line((frame[0], frame[3], frame[2], frame[3]), fill=sheet.ink)
    sheet.line(value, hand, x=x + 8, y=y + round(0.25 * size))
    return frame


def _tick_boxes(sheet: Sheet) -> list[Turn]:
    rng, side, questions = sheet.rng, sheet.text_size, []
    x = sheet.left
    for label in rng.sample(_BOXES, 4):
        width = round(sheet.font().getlength(label)) + 3 * side
        if x + width > sheet.left + sheet.width:
            x, sheet.y = sheet.left, sheet.y + 2 * side
        if sheet.room < 2 * side:
            break
        box = (x, sheet.y, x + side, sheet.y + side)
        sheet.draw.rectangle(box, outline=sheet.ink, width=2)
        ticked = rng.random() < 0.5
        if ticked:
            sheet.draw.line((x + 3, sheet.y + side // 2, x + side // 2, sheet.y + side - 4), fill=sheet.ink, width=3)
            sheet.draw.line((x + side // 2, sheet.y + side - 4, x + side + 3, sheet.y - 3), fill=sheet.ink, width=3)
        sheet.line(label, sheet.font(), x=x + round(1.5 * side))
        x += width
        questions.append(ask(rng, _BOX, "yes" if ticked else "no", "exact", label=label, box=box))
    return questions
