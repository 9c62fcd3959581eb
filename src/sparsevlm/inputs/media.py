"""Pictures and folders of frames read from disk."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_WHITE_8, _WHITE_16 = 255, 65535


def load_image(path: str | Path) -> Image.Image:
    """Read one picture, turned upright by its EXIF orientation.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no picture, a damaged one, or one that is refused by :func:`as_rgb`.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a picture" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"image {path} {what}.")
    return _decoded(path, str(path))


def decode_image(content: bytes) -> Image.Image:
    """Read one picture from the bytes of its file, as :func:`load_image` does.

    Raises
    ------
    ValueError
        As :func:`load_image`.
    """
    return _decoded(io.BytesIO(content), "what its bytes hold")


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode with 8 bits for each of red, green and blue.

    Raises
    ------
    ValueError
        As :func:`eight_bits`.
    """
    return eight_bits(image).convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """A picture with at most 8 bits per channel: grey values of 16 bits are scaled, any other picture is left as it is.

    Pillow's own conversion cuts every value above 255 off, which leaves a white page. Mode ``I`` is 32 bits wide, but
    holds values of 8 or 16 bits.

    Raises
    ------
    ValueError
        If the mode does not say which value is white; the message has the remedy.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if image.mode == "F" or least < 0 or most > _WHITE_16:
        raise ValueError(
            f"pixels of mode {image.mode}, here from {least} to {most}, do not say which value is white; save the "
            "picture with 8 or 16 bits per channel."
        )
    if image.mode != "I" or most > _WHITE_8:
        step = _WHITE_16 // _WHITE_8
        values = (values.astype(np.int32) + step // 2) // step
    return Image.fromarray(values.astype(np.uint8))


def load_frames(folder: str | Path) -> list[Image.Image]:
    """Read the frames of a video from a folder of pictures, in the order of their names.

    Numbers in names count as numbers: ``frame_2.png`` comes before ``frame_10.png``.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If the folder holds no pictures, or frames of different sizes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file; give a folder with one picture per frame" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"video folder {folder} {what}.")
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in FRAME_SUFFIXES), key=_natural)
    if not files:
        raise ValueError(f"video folder {folder} holds no pictures ({', '.join(FRAME_SUFFIXES)}).")
    frames = [load_image(file) for file in files]
    check_same_size(frames)
    return frames


def check_same_size(frames: list[Image.Image]) -> None:
    """Raise ``ValueError`` where the frames of one video differ in size."""
    if len(sizes := {frame.size for frame in frames}) > 1:
        found = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ValueError(f"the frames of a video must be of one size, got {found}.")


def _decoded(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as opened:
            return as_rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels to be read safely ({error}); save it smaller.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is a damaged image: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key: runs of digits by value, all else by text."""
    pieces = re.split(r"(\d+)", file.name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]
