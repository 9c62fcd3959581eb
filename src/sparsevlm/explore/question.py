"""A question about an uploaded picture, within the limits of the page."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..inputs import as_rgb
from ..inputs.decoding import decode
from ..inputs.media import check_aspect_ratio

MAX_BYTES = 20 * 1024**2  # of an uploaded file
MAX_PIXELS = 40_000_000
MAX_CHARACTERS = 4000


@dataclass(frozen=True)
class Question:
    """A picture, a question about it, and how long an answer may be.

    Attributes
    ----------
    picture : PIL image
        8-bit RGB.
    text : str
    max_new_tokens : int
    """

    picture: Image.Image
    text: str
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("there is no question: write one beside the picture.")
        if len(self.text) > MAX_CHARACTERS:
            raise ValueError(f"the question has {len(self.text)} characters; the page takes up to {MAX_CHARACTERS}.")


def read_picture(file: str | None) -> Image.Image:
    """Read an uploaded picture as 8-bit RGB.

    Parameters
    ----------
    file : str, optional
        Path on the server; messages give the name alone.

    Raises
    ------
    ValueError
        If there is none, it is no picture or a damaged one, or has too many pixels or sides that no model takes.
    """
    if file is None:
        raise ValueError("there is no picture: upload one.")
    path = Path(file)
    _check_pixels(path)
    picture = as_rgb(decode(path, path.name), name=path.name)
    check_aspect_ratio(picture.size, path.name)
    return picture


def _check_pixels(path: Path) -> None:
    """Refuse too large a picture by its header, before it takes memory; what is no picture is left to the decoder."""
    size = (0, 0)
    with contextlib.suppress(Exception), Image.open(path) as header:
        size = header.size
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"{path.name} has {size[0]}x{size[1]} pixels; the page takes up to {MAX_PIXELS // 10**6} million: save it "
            "smaller."
        )
