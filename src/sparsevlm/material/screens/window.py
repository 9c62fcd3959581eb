"""A window of a program that does not exist."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..example import Box
from ..fonts import font, pick_font
from ..splits import EVALUATION, sizes
from ..words import company, person, some, word
from .theme import pick_theme

# Columns and rows of visual tokens of 28 pixels; each size is of one split.
GRIDS = sizes(((22, 16), (26, 20), (34, 24), (20, 30)), range(18, 37), range(14, 33), range(256, 1025))
_TOKEN = 28
_DOTS = ((230, 90, 80), (240, 190, 60), (90, 190, 90))


@dataclass
class Window:
    """What a screen shows.

    Attributes
    ----------
    image : PIL image
    title, open_menu, active_tab : str
    menus, entries, tabs, buttons : list of str
        Of the menu bar, of the open menu, of the row of tabs, and in the window.
    switches : dict of str to bool
    fields : dict of str to str
    boxes : dict of str to Box
        Where buttons, switches and fields are, in pixels (left, top, right, bottom).
    """

    image: Image.Image
    title: str
    menus: list[str]
    open_menu: str
    entries: list[str]
    tabs: list[str]
    active_tab: str
    buttons: list[str]
    switches: dict[str, bool]
    fields: dict[str, str]
    boxes: dict[str, Box]


class _Painter:
    """Draws a window from top to bottom."""

    def __init__(self, rng: random.Random, split: str, size: tuple[int, int], text_size: int) -> None:
        self.rng, self.split, self.theme = rng, split, pick_theme(rng, split)
        self.image = Image.new("RGB", size, self.theme.ground)
        self.draw = ImageDraw.Draw(self.image)
        self.face, self.size = pick_font(rng, split), text_size
        self.y = 0
        self.boxes: dict[str, Box] = {}

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        return font(self.face, self.size)

    def width(self, text: str) -> int:
        return round(self.font.getlength(text))

    def text(self, x: int, y: int, text: str, colour: tuple[int, int, int], anchor: str = "lm") -> None:
        self.draw.text((x, y), text, font=self.font, fill=colour, anchor=anchor)

    def bar(self, height: int, colour: tuple[int, int, int]) -> int:
        """A bar from side to side; the middle of its height."""
        self.draw.rectangle((0, self.y, self.image.width, self.y + height), fill=colour)
        self.y += height
        return self.y - height // 2


def draw_window(rng: random.Random, split: str) -> Window:
    """A window with everything in it, in smaller letters where they must be; nothing hides what is asked about."""
    columns, rows = rng.choice(GRIDS[split])
    size = (columns * _TOKEN, rows * _TOKEN)
    text_size = rng.randint(14, 14 + size[0] // 70)
    while True:
        window = _paint(_Painter(rng, split, size, text_size))
        lowest = max(box[3] for box in window.boxes.values())
        if window.fields and window.switches and len(window.buttons) > 1 and lowest < size[1] - 2.7 * text_size:
            return window
        text_size -= 1


def _paint(painter: _Painter) -> Window:
    rng, split = painter.rng, painter.split
    title = f"{word(rng, 'company', split)} {rng.choice(('Editor', 'Mail', 'Manager', 'Viewer', 'Studio'))}"
    _title_bar(painter, title)
    menus, opened, places = _menu_bar(painter)
    below = painter.y
    tabs, active = _tabs(painter)
    entries, right = _open_menu(painter, places[opened], below)
    left = right + painter.size if right < 0.6 * painter.image.width else painter.size
    if left == painter.size:
        painter.y = max(painter.y, below + (len(entries) + 1) * 2 * painter.size)
    fields = _fields(painter, left)
    switches = _switches(painter, left)
    buttons = _buttons(painter, left)
    return Window(painter.image, title, menus, opened, entries, tabs, active, buttons, switches, fields, painter.boxes)


def _title_bar(painter: _Painter, title: str) -> None:
    theme, size = painter.theme, painter.size
    middle = painter.bar(2 * size, theme.title)
    at_left = painter.split == EVALUATION
    for i in range(3):
        x = size * (1 + i) if at_left else painter.image.width - size * (1 + i)
        painter.draw.ellipse((x - 5, middle - 5, x + 5, middle + 5), fill=_DOTS[i])
    if at_left:
        painter.text(painter.image.width // 2, middle, title, theme.title_ink, "mm")
        return
    most = max(size, painter.image.width - 5 * size - painter.width(title))
    x = painter.rng.randint(size, most) if painter.rng.random() < 0.5 else size
    painter.text(x, middle, title, theme.title_ink)


def _menu_bar(painter: _Painter) -> tuple[list[str], str, dict[str, int]]:
    """Names of the menus, the one that is open, and where each begins."""
    rng, size = painter.rng, painter.size
    middle, x, places = painter.bar(2 * size, painter.theme.bar), size, {}
    for name in some(rng, "menu", painter.split, rng.randint(3, 5)):
        if x + painter.width(name) > painter.image.width - size:
            break
        places[name] = x
        x += painter.width(name) + round(1.5 * size)
    opened = rng.choice(list(places))
    left = places[opened]
    frame = (left - size // 2, middle - size, left + painter.width(opened) + size // 2, middle + size)
    painter.draw.rectangle(frame, fill=painter.theme.accent)
    for name, left in places.items():
        painter.text(left, middle, name, painter.theme.accent_ink if name == opened else painter.theme.ink)
    return list(places), opened, places


def _tabs(painter: _Painter) -> tuple[list[str], str]:
    """Names of the tabs at the lower edge, where no menu hides them, and the active one."""
    rng, size, theme = painter.rng, painter.size, painter.theme
    names = some(rng, "topic", painter.split, rng.randint(2, 4))
    width = (painter.image.width - size) // len(names)
    active = rng.choice(names)
    top = painter.image.height - round(2.6 * size)
    for i, name in enumerate(names):
        frame = (size // 2 + i * width, top, size // 2 + (i + 1) * width - 4, painter.image.height - size // 2)
        painter.draw.rectangle(frame, fill=theme.field if name == active else theme.bar, outline=theme.line)
        if name == active:
            painter.draw.rectangle((frame[0], top, frame[2], top + 4), fill=theme.accent)
        painter.text((frame[0] + frame[2]) // 2, (top + frame[3]) // 2 + 2, name, theme.ink, "mm")
    return names, active


def _open_menu(painter: _Painter, left: int, top: int) -> tuple[list[str], int]:
    """Entries of the open menu, and its right edge."""
    rng, size, theme = painter.rng, painter.size, painter.theme
    entries = some(rng, "entry", painter.split, rng.randint(3, 5))
    width = max(map(painter.width, entries)) + 3 * size
    left = max(2, min(left - size // 2, painter.image.width - width - 2))
    frame = (left, top, left + width, top + len(entries) * 2 * size + size // 2)
    painter.draw.rectangle(frame, fill=theme.field, outline=theme.line)
    for i, entry in enumerate(entries):
        painter.text(left + size, top + round((2 * i + 1.2) * size), entry, theme.ink)
    return entries, left + width


def _fields(painter: _Painter, left: int) -> dict[str, str]:
    """Labels above fields with text in them."""
    rng, size, theme, split = painter.rng, painter.size, painter.theme, painter.split
    values = {
        "Name": person(rng, split),
        "City": word(rng, "city", split),
        "Company": company(rng, split),
        "Code": str(rng.randint(1000, 99999)),
        "Department": word(rng, "department", split),
    }
    shown = {}
    painter.y += size
    for name in rng.sample(list(values), rng.randint(2, 3)):
        if painter.y + 4 * size > painter.image.height - 9 * size:
            break
        painter.text(left, painter.y + size // 2, name, theme.ink)
        right = min(painter.image.width - size, left + max(15 * size, painter.width(values[name]) + 2 * size))
        box = (left, painter.y + round(1.2 * size), right, painter.y + 3 * size)
        painter.draw.rectangle(box, fill=theme.field, outline=theme.line)
        painter.text(left + size // 2, (box[1] + box[3]) // 2, values[name], theme.ink)
        painter.boxes[name] = box
        shown[name] = values[name]
        painter.y += round(3.6 * size)
    return shown


def _switches(painter: _Painter, left: int) -> dict[str, bool]:
    rng, size, theme = painter.rng, painter.size, painter.theme
    switches: dict[str, bool] = {}
    for name in some(rng, "setting", painter.split, rng.randint(2, 4)):
        if painter.y + 2 * size > painter.image.height - 6 * size and switches:
            break
        on = rng.random() < 0.5
        box = (left, painter.y, left + round(2.2 * size), painter.y + round(1.2 * size))
        radius = (box[3] - box[1]) // 2
        painter.draw.rounded_rectangle(box, radius=radius, fill=theme.accent if on else theme.off)
        knob = box[2] - 2 * radius if on else box[0]
        painter.draw.ellipse((knob + 2, box[1] + 2, knob + 2 * radius - 2, box[3] - 2), fill=(250, 250, 250))
        painter.text(box[2] + size // 2, (box[1] + box[3]) // 2, name, theme.ink)
        painter.boxes[name], switches[name] = box, on
        painter.y += round(1.8 * size)
    return switches


def _buttons(painter: _Painter, left: int) -> list[str]:
    """A row of buttons, from the left or up to the right edge."""
    rng, size, theme = painter.rng, painter.size, painter.theme
    taken = painter.image.height - round(3.2 * size)
    top = rng.randint(painter.y, max(painter.y, taken - 2 * size))
    x, names = left, list[str]()
    for name in some(rng, "button", painter.split, rng.randint(2, 4)):
        width = painter.width(name) + 2 * size
        if x + width > painter.image.width - 4:
            break
        box = (x, top, x + width, top + round(1.9 * size))
        first = not names
        painter.draw.rounded_rectangle(
            box, radius=theme.radius, fill=theme.accent if first else theme.bar, outline=theme.line
        )
        ink = theme.accent_ink if first else theme.ink
        painter.text((box[0] + box[2]) // 2, (box[1] + box[3]) // 2, name, ink, "mm")
        painter.boxes[name] = box
        names.append(name)
        x += width + rng.randint(size // 2, 2 * size)
    return names
