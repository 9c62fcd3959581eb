"""An empty chart of matplotlib, of a random size and look."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from ..splits import EVALUATION, TRAINING, sizes

# Columns and rows of visual tokens of 28 pixels; each size is of one split.
GRIDS = sizes(((18, 16), (22, 20), (26, 20), (30, 26), (36, 28)), range(16, 37), range(14, 33), range(256, 1025))
_TOKEN, _DPI = 28, 100
COLOURS = {
    "blue": "#2f6fdf",
    "orange": "#f28c1c",
    "green": "#2c9a45",
    "red": "#d62b2b",
    "purple": "#8a4fbf",
    "brown": "#8a5a3c",
    "pink": "#ee82be",
    "grey": "#8c8c8c",
    "black": "#1a1a1a",
    "yellow": "#e4c91c",
    "turquoise": "#26bfcb",
}
_FAMILIES = {
    TRAINING: ("DejaVu Sans", "DejaVu Serif", "STIXGeneral"),
    EVALUATION: ("DejaVu Sans Mono",),
}
_BACKGROUNDS = {TRAINING: ("white", "#f4f1e8", "#eef3fa"), EVALUATION: ("#ebebeb", "#fdf6f0", "white")}


class Plot:
    """A figure with one pair of axes.

    Parameters
    ----------
    rng : random.Random
    split : str
        Whose colours of the ground are taken.
    size : tuple of int
        Width and height in pixels.

    Attributes
    ----------
    axes : matplotlib.axes.Axes
    """

    def __init__(self, rng: random.Random, split: str, size: tuple[int, int]) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        background = rng.choice(_BACKGROUNDS[split])
        self.figure = Figure(figsize=(size[0] / _DPI, size[1] / _DPI), dpi=_DPI, layout="constrained")
        self._canvas = FigureCanvasAgg(self.figure)
        self.figure.set_facecolor(background)
        self.axes = self.figure.add_subplot()
        self.axes.set_facecolor(background)
        self._hides_frame = rng.random() < 0.5
        self.grid_axis: str | None = rng.choice(("y", "both", None))

    def finish(self) -> Image.Image:
        """The picture."""
        if self._hides_frame:
            self.axes.spines[["top", "right"]].set_visible(False)
        if self.grid_axis is not None:
            self.axes.grid(axis=self.grid_axis, alpha=0.4)  # type: ignore[arg-type]
            self.axes.set_axisbelow(True)
        self._canvas.draw()
        return Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3].copy())


@contextmanager
def opened(rng: random.Random, split: str) -> Iterator[Plot]:
    """A plot, in letters of a font and size of the split while it is drawn.

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib; the message has the pip line.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawn charts need matplotlib, which the extra cli brings: run "
            '`pip install ".[cli]"` in the source tree, or `pip install matplotlib`.'
        ) from error
    columns, rows = rng.choice(GRIDS[split])
    size = rng.uniform(9.5, 13) * max(1.0, columns / 26)
    style: Any = {"font.family": rng.choice(_FAMILIES[split]), "font.size": size}
    with matplotlib.rc_context(style):
        yield Plot(rng, split, (columns * _TOKEN, rows * _TOKEN))


def some_colours(rng: random.Random, count: int, *, dark: bool = True) -> list[str]:
    """Names of unlike colours; without the one that black letters cannot be read on, where ``dark`` is off."""
    return rng.sample([name for name in COLOURS if dark or name != "black"], count)


def apart(rng: random.Random, count: int, top: int) -> list[int]:
    """Unlike values that differ by a twentieth of ``top`` at least, so that an eye can tell which is larger."""
    step = max(1, top // 20)
    return [step * value for value in rng.sample(range(2, 21), count)]
