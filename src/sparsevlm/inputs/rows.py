"""Rows of a dataset: the pictures and the question that their columns hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .media import MAX_ASPECT_RATIO, decode_image, load_image
from .pixels import as_rgb
from .placeholders import IMAGE_TOKEN, VIDEO_TOKEN
from .sources import resolve
from .visuals import read_image


def row_image(value: Any, folder: Path | None = None) -> Image.Image:
    """Decode one picture of a row.

    Parameters
    ----------
    value : str, bytes, dict, array or PIL image
        A path, ``file://`` or ``data:`` address; the bytes of a picture file; the ``{"bytes", "path"}`` of a
        ``datasets`` image; or an array of whole numbers up to 255, (height, width) or with 1, 3 or 4 channels in front
        or behind.
    folder : Path, optional
        What relative paths start from; the working directory where omitted.

    Returns
    -------
    PIL image
        8-bit RGB.

    Raises
    ------
    ValueError
        If it is none or cannot be read. The message goes on behind the name of the row.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, bytes, np.ndarray, Image.Image)):
        raise ValueError(f"has an image of type {type(value).__name__}; give a path or the bytes of a picture file")
    try:
        image = _decoded(value, folder or Path())
    except (OSError, ValueError) as error:
        raise ValueError(f"has an unusable image: {error}") from error
    if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
        raise ValueError(
            f"has an image of {image.width}x{image.height} pixels, and the model takes sides of up to "
            f"{MAX_ASPECT_RATIO} to 1; crop it"
        )
    return image


def check_question(
    question: Any, column: str = "question", placeholders: Sequence[str] = (IMAGE_TOKEN, VIDEO_TOKEN)
) -> None:
    """Refuse what cannot be asked.

    Parameters
    ----------
    question : object
    column : str
        Where it was found.
    placeholders : sequence of str
        What the prompt holds in the place of a picture or video.

    Raises
    ------
    ValueError
        If it is no text, is blank, or holds a placeholder. The message goes on behind the name of the row.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"has no question; give a text in the column {column!r}")
    if found := [token for token in placeholders if token in question]:
        raise ValueError(f"has {found[0]} in its question, where a picture would be put; take it out")


def _decoded(value: str | bytes | np.ndarray | Image.Image, folder: Path) -> Image.Image:
    if isinstance(value, Image.Image):
        return as_rgb(value)
    if isinstance(value, np.ndarray):
        return _of_array(value)
    content = resolve(value) if isinstance(value, str) else value
    return decode_image(content) if isinstance(content, bytes) else load_image(folder / content)


def _of_array(values: np.ndarray) -> Image.Image:
    if values.dtype.kind not in "iu":
        raise ValueError(f"it is an array of {values.dtype}; scale it to 0 to 255 and store it as uint8.")
    pixels = read_image(values[..., None] if values.ndim == 2 else values, "it")
    return Image.fromarray(np.moveaxis(pixels, 0, -1).astype(np.uint8))
