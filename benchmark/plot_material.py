"""Contact sheets of the drawn tasks: ``python -m benchmark.plot_material`` writes one for each family.

They show held-out examples, one of every task, with a question below each.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from sparsevlm.evaluation.suites.drawn import DrawnSuite
from sparsevlm.evaluation.suites.seeded import FIRST_SEED
from sparsevlm.evaluation.suites.suite import Sample
from sparsevlm.material.fonts import font

FOLDER = Path(__file__).parent.parent / "docs" / "images" / "material"
SHEETS = ("grounds", "documents", "charts", "screens", "whole", "chat")
_COLUMNS = 4
_CELL = (250, 250)
_GAP = 8
_LINE = 15
_LINES = 3
_QUALITY = 75  # of JPEG


def sheet(family: str, seed: int) -> Image.Image:
    """One example of every task of a family, side by side."""
    samples = [next(suite.rows(task, 1)).load() for suite in [DrawnSuite(family, seed)] for task in suite.tasks]
    columns = min(_COLUMNS, len(samples))
    step = (_CELL[0] + _GAP, _CELL[1] + _GAP + _LINES * _LINE)
    rows = -(-len(samples) // columns)
    whole = Image.new("RGB", (columns * step[0] + _GAP, rows * step[1] + _GAP), "white")
    for i, sample in enumerate(samples):
        _place(whole, sample, (_GAP + i % columns * step[0], _GAP + i // columns * step[1]))
    return whole


def _place(whole: Image.Image, sample: Sample, corner: tuple[int, int]) -> None:
    image = sample.images[0].copy()
    image.thumbnail(_CELL, Image.Resampling.LANCZOS)
    whole.paste(image, (corner[0] + (_CELL[0] - image.width) // 2, corner[1]))
    draw, face = ImageDraw.Draw(whole), font("DejaVuSans", 11)
    lines = [*_wrapped(sample.question, face, 2), sample.answers[0]]
    for i, line in enumerate(lines):
        ink = "#1a1a1a" if i < len(lines) - 1 else "#0a6a3a"
        draw.text((corner[0], corner[1] + image.height + 2 + i * _LINE), line, fill=ink, font=face)


def _wrapped(text: str, face: object, n_lines: int) -> list[str]:
    """A text in at most so many lines, with dots where it goes on."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and face.getlength(longer) > _CELL[0] - 12:  # type: ignore[attr-defined]
            lines.append(word)
        else:
            lines[-1] = longer
    return lines if len(lines) <= n_lines else [*lines[: n_lines - 1], f"{lines[n_lines - 1]} …"]


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in SHEETS:
        file = FOLDER / f"{name}.jpg"
        sheet(name, FIRST_SEED).save(file, quality=_QUALITY, optimize=True)
        print(file)
