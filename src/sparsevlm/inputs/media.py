"""Pictures and folders of frames read from disk."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def load_image(path: str | Path) -> Image.Image:
    """Read one picture, turned upright by its EXIF orientation.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no picture, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a picture" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"image {path} {what}.")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is a damaged image: {error}.") from error


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


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key: runs of digits by value, all else by text."""
    pieces = re.split(r"(\d+)", file.name)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]
