"""Images and the frames of videos, read from disk."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .decoding import check_is_file, decode, decode_frames
from .pixels import as_rgb, grey_depth, warn_of_depth
from .sources import resolve

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MAX_ASPECT_RATIO = 200  # of transformers' smart_resize
_MANY_FRAMES = "an animated GIF, WebP or PNG, or a TIFF of several pages"


def load_image(source: str | os.PathLike[str], frame: int | None = None) -> Image.Image:
    """Read one image as 8-bit RGB: upright by its EXIF orientation, transparency composited onto white.

    Parameters
    ----------
    source : str or Path
        A file; a ``file://`` or ``data:`` address, or base64, as :func:`~sparsevlm.inputs.sources.resolve` takes them.
    frame : int, optional
        Which frame or page of a file with several, from 0. Where omitted it is the first, and a warning says so.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    PermissionError
        If it may not be read.
    ValueError
        If it is an address on the network, no image, a damaged one, has no such frame, or is refused by :func:`as_rgb`.
    """
    content = resolve(source)
    name = str(content) if isinstance(content, Path) else "the image in the data: address or base64"
    return as_rgb(decode(content, name, frame), name=name)


def decode_image(content: bytes) -> Image.Image:
    """Read one image from the bytes of its file, as :func:`load_image` does.

    Raises
    ------
    ValueError
        As :func:`load_image`.
    """
    name = "what its bytes hold"
    return as_rgb(decode(content, name), name=name)


def load_frames(source: str | os.PathLike[str]) -> list[Image.Image]:
    """Read the frames of a video from a folder of images, in the order of their names, or from a file with several.

    Numbers in names count as numbers: ``frame_2.png`` comes before ``frame_10.png``. Hidden files are skipped. Grey
    values beyond 8 bits have one depth in all frames.

    Parameters
    ----------
    source : str or Path
        A folder, or an animated GIF, WebP or PNG, or a TIFF of several pages; ``file://`` addresses, too.

    Returns
    -------
    list of PIL images
        8-bit RGB, all of one size.

    Raises
    ------
    FileNotFoundError, PermissionError
        If there is no such folder or file, it may not be read, or the file holds one image only.
    ValueError
        If the folder holds no images, the file cannot be decoded, or frames differ in size.
    """
    content = resolve(source)
    if isinstance(content, Path) and os.path.isdir(content):
        files = _frame_files(content)
        return rgb_frames([decode(file, str(file)) for file in files], str(content))
    name = str(content) if isinstance(content, Path) else "the video in the data: address or base64"
    return rgb_frames(_frames_of_file(content, name), name)


def rgb_frames(frames: Sequence[Image.Image], name: str) -> list[Image.Image]:
    """Convert the frames of one video to 8-bit RGB; grey values beyond 8 bits have one depth in all of them.

    Raises
    ------
    ValueError
        If frames differ in size, or as :func:`as_rgb`.
    """
    check_same_size(frames)
    if (bits := grey_depth(frames)) is not None:
        warn_of_depth(frames, bits, name)
    return [as_rgb(frame, name=f"frame {number} of {name}", bits=bits) for number, frame in enumerate(frames)]


def check_same_size(frames: Sequence[Image.Image]) -> None:
    """Raise ``ValueError`` where the frames of one video differ in size."""
    if len(sizes := {frame.size for frame in frames}) > 1:
        found = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise ValueError(f"the frames of a video must be of one size, got {found}.")


def check_aspect_ratio(size: tuple[int, int], name: str) -> None:
    """Raise where transformers' image processors would refuse the sides of an image, which they do without its name.

    Parameters
    ----------
    size : tuple of int
        Width and height.
    name : str

    Raises
    ------
    ValueError
        If a side is more than 200 times the other.
    """
    width, height = size
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(
            f"{name} has {width}x{height} pixels, and the model takes sides of up to {MAX_ASPECT_RATIO} to 1; crop it."
        )


def _frame_files(folder: Path) -> list[Path]:
    try:
        visible = [file for file in folder.iterdir() if not file.name.startswith(".")]
    except PermissionError as error:
        raise PermissionError(f"video folder {folder} cannot be read: permission denied; check its rights.") from error
    files = sorted((file for file in visible if file.suffix.lower() in FRAME_SUFFIXES), key=_natural)
    if not files:
        raise ValueError(f"video folder {folder} holds no pictures ({', '.join(FRAME_SUFFIXES)}).")
    return files


def _frames_of_file(content: Path | bytes, name: str) -> list[Image.Image]:
    if isinstance(content, Path):
        wanted = f"a folder with one image per frame, or {_MANY_FRAMES}"
        check_is_file(content, f"video {name}", noun="a video", wanted=wanted)
    frames = decode_frames(content, name)
    if len(frames) == 1:
        raise FileNotFoundError(
            f"video {name} is a file with one image; give a folder with one image per frame, or {_MANY_FRAMES}."
        )
    return frames


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key: runs of digits by value, all else by text."""
    pieces = re.split(r"(\d+)", file.name)
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]
