"""Screens: windows with buttons, menus, fields, switches and tabs."""

from __future__ import annotations

from ...scenes import BOX_UNIT
from ..asking import ask
from ..example import Box, Drawing, Request, TaskFamily, Turn
from .window import Window, draw_window

_UNIT = f"Answer with left, top, right and bottom in units of {BOX_UNIT} pixels."
_BOX = (
    f"Where is the button {{name}}? {_UNIT}",
    f"Give the box of the button {{name}}. {_UNIT}",
    f"Which button has {{name}} on it? {_UNIT}",
    f"Locate the button {{name}}. {_UNIT}",
)


def in_units(box: Box) -> str:
    """A box of pixels as the scenes tell theirs: rounded outwards, two digits each."""
    left, top, right, bottom = box
    edges = (left // BOX_UNIT, top // BOX_UNIT, -(-right // BOX_UNIT), -(-bottom // BOX_UNIT))
    return ",".join(f"{edge:02d}" for edge in edges)


def questions_of(request: Request, window: Window) -> dict[str, list[Turn]]:
    """Everything that can be asked about a window, by task."""
    rng = request.rng
    titles = [ask(rng, ("What is the title of the window?", "Which program is this?"), window.title)]
    menus = [
        ask(rng, ("How many menus does the menu bar have?", "Count the menus in the bar."), str(len(window.menus))),
        ask(rng, ("Which menu is open?", "Name the menu that is unfolded."), window.open_menu),
        *(
            ask(rng, ("Which entry is number {n} of the open menu?", "Read entry {n} of the menu."), entry, n=n)
            for n, entry in enumerate(window.entries, start=1)
        ),
    ]
    tabs = [ask(rng, ("Which tab is active?", "Which tab is in front?"), window.active_tab)]
    switches = [
        ask(rng, ("Is {name} switched on?", "Is {name} on?", "Has {name} been enabled?"), "yes" if on else "no",
            name=name, box=window.boxes[name])
        for name, on in window.switches.items()
    ]  # fmt: skip
    fields = [
        ask(rng, ("What is in the field {name}?", "Which text stands in {name}?", "Read the field {name}."), text,
            name=name.lower(), box=window.boxes[name])
        for name, text in window.fields.items()
    ]  # fmt: skip
    buttons = [
        ask(rng, _BOX, in_units(window.boxes[name]), "iou", name=name, box=window.boxes[name])
        for name in window.buttons
    ]
    return {"button": buttons, "switch": switches, "field": fields, "menu": menus, "tab": [*tabs, *titles]}


def _draw(request: Request) -> Drawing:
    window = draw_window(request.rng, request.split)
    return (window.image,), request.choose(questions_of(request, window)[request.task])


SCREENS = TaskFamily("screens", ("button", "switch", "field", "menu", "tab"), _draw)

__all__ = ["SCREENS", "Window", "draw_window", "in_units", "questions_of"]
