"""Decodes image files with Pillow; says what a file is that Pillow cannot decode."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Their further frames are layers and thumbnails: every viewer shows the first one only.
_ONE_IMAGE = ("MPO", "PSD")
# What Pillow recognises without being able to draw it, or by starting another program (EPS).
_DRAWINGS = {"EPS": "an EPS drawing", "WMF": "a WMF drawing", "MPEG": "a video"}
_TO_FRAMES = "extract its frames to a folder of images, as with ffmpeg -i video.mp4 frames/%05d.png, and give that"
_HEIC = "save it as JPEG or PNG, or install pillow-heif and call pillow_heif.register_heif_opener() beforehand"
_BEGINNINGS = (
    (b"%PDF", "a PDF document", "save the page as PNG"),
    (b"version https://git-lfs", "a Git LFS pointer", "get the file itself with git lfs pull"),
    (b"\x1aE\xdf\xa3", "a video", _TO_FRAMES),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image", "save it as JPEG or PNG"),
    (b"\x00\x05\x16\x07", "metadata that macOS keeps beside a file", "give the file without ._ before its name"),
    (b"\xff\x0a", "a JPEG XL image", "save it as JPEG or PNG"),
)
# Brands of ISO media files, four bytes at offset 8.
_BRANDS = {
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), ("a HEIC image", _HEIC)),
    **dict.fromkeys((b"avif", b"avis"), ("an AVIF image", "save it as PNG, or install Pillow 11.3 or newer")),
}
_WIDEST_OF_14_BITS = 63  # upper byte of 2^14 - 1


def decode(source: Path | bytes, name: str, frame: int | None = None) -> Image.Image:
    """Decode one image, upright by its EXIF orientation, in the mode in which it is stored.

    Parameters
    ----------
    source : Path or bytes
        The file, or what it holds.
    name : str
        What messages call it.
    frame : int, optional
        Which frame or page, from 0; the first where omitted, with a warning if there are others.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    PermissionError
        If it may not be read.
    ValueError
        If it is no image, a damaged one, one with too many pixels, or has no such frame.
    """
    with _opened(source, name) as image:
        n_frames = 1 if image.format in _ONE_IMAGE and frame is None else getattr(image, "n_frames", 1)
        if frame is not None and not 0 <= frame < n_frames:
            held = "one frame, number 0" if n_frames == 1 else f"{n_frames} frames, numbered from 0"
            raise _UnreadableError(f"{name} has {held}; there is no frame {frame}.")
        if frame is None and n_frames > 1:
            warnings.warn(
                f"sparsevlm: {name} has {n_frames} frames or pages, and the first is read; pick one by its number with "
                "--frame (frame= in Python), or give the file as a video to take them all.",
                stacklevel=3,
            )
        return _frame(image, frame or 0, name)


def decode_frames(source: Path | bytes, name: str) -> list[Image.Image]:
    """Decode all frames or pages of one file, in their stored mode.

    Raises
    ------
    FileNotFoundError, PermissionError, ValueError
        As :func:`decode`.
    """
    with _opened(source, name) as image:
        n_frames = 1 if image.format in _ONE_IMAGE else getattr(image, "n_frames", 1)
        return [_frame(image, number, name) for number in range(n_frames)]


def check_is_file(path: Path, name: str, *, noun: str = "a picture", wanted: str = "an image file") -> None:
    """Raise unless a path is a file that can be opened.

    Parameters
    ----------
    path : Path
    name, noun, wanted : str
        What messages call the path, what it is to be, and what they ask for.

    Raises
    ------
    FileNotFoundError
        If nothing is there, or something that is no file.
    PermissionError
        If it may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise PermissionError(f"{name} cannot be read: permission denied; check the rights of its folder.") from error
    except (OSError, ValueError) as error:
        target, remedy = "", "check the path"
        if os.path.islink(path):
            target, remedy = f" is a symbolic link to {os.readlink(path)}, which", "mend the link"
        elif not path.is_absolute():
            remedy += ", which starts at the working directory"
        raise FileNotFoundError(f"{name}{target} does not exist; {remedy}, or give {wanted}.") from error
    kinds = (
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISDIR, "a folder"),
    )
    if found := [kind for holds, kind in kinds if holds(mode)]:
        remedy = "" if found[0] == "a folder" else " Write what it gives into a file first."
        raise FileNotFoundError(f"{name} is {found[0]}, not {noun}; give {wanted}.{remedy}")


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """Open an image; whatever goes wrong until it is closed is said with its name."""
    if isinstance(source, Path):
        check_is_file(source, name)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in _DRAWINGS or isinstance(image, ImageFile.StubImageFile):
                kind = _DRAWINGS.get(str(image.format), f"of the format {image.format}")
                raise _UnreadableError(f"{name} is {kind}, which is not decoded here; save it as PNG.")
            yield image
    except (_UnreadableError, UserWarning):
        raise
    except PermissionError as error:
        raise PermissionError(f"{name} cannot be read: permission denied; check its rights (chmod u+r).") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read{_what_it_is(source)}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} has too many pixels to be read safely ({error}); save it smaller.") from error
    except MemoryError as error:
        raise ValueError(f"{name} needs more memory than there is; save it smaller.") from error
    except Exception as error:  # Pillow's decoders meet damage with nearly every type of error
        raise ValueError(f"{name} is a damaged image: {error or type(error).__name__}.") from error


class _UnreadableError(ValueError):
    """An error of :func:`_opened` whose message needs no more words."""


def _frame(image: Image.Image, number: int, name: str) -> Image.Image:
    """Decode one frame of an open file."""
    image.seek(number)
    tiles = getattr(image, "tile", None)
    raw_mode = str(tiles[0][3]) if tiles else ""
    upright = ImageOps.exif_transpose(image)
    if ";16" in raw_mode and not upright.mode.startswith("I"):
        _warn_of_lost_depth(upright, name)
    return upright


def _warn_of_lost_depth(image: Image.Image, name: str) -> None:
    """Colours of 16 bits reach us with their upper 8 alone: an image of 12 bits is nearly black by then."""
    colours = np.asarray(image.convert("RGB"))
    if colours.max(initial=0) <= _WIDEST_OF_14_BITS:
        warnings.warn(
            f"sparsevlm: {name} stores colours in 16 bits, of which Pillow reads the upper 8, and all are dark. If "
            "they use fewer bits, such as 12, save the image with 8 bits per channel.",
            stacklevel=4,
        )


def _what_it_is(source: Path | bytes) -> str:
    """Say what a file is that is no image, and what to do; empty where its first bytes do not tell."""
    head = source[:4096] if isinstance(source, bytes) else _head(source)
    if not head:
        return ": it is empty; download or save it again"
    for beginning, kind, remedy in _BEGINNINGS:
        if head.startswith(beginning):
            return f": it is {kind}; {remedy}"
    if head[4:8] == b"ftyp":
        kind, remedy = _BRANDS.get(head[8:12], ("a video", _TO_FRAMES))
        return f": it is {kind}; {remedy}"
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return f": it is a video; {_TO_FRAMES}"
    return _what_text_it_is(head)


def _what_text_it_is(head: bytes) -> str:
    if b"<svg" in head.lower():
        return ": it is an SVG drawing; save it as PNG"
    if b"<html" in head.lower() or b"<!doctype html" in head.lower():
        return ": it is a web page; download the image itself"
    # The last bytes may be half of a character.
    if b"\x00" not in head and head[:-4].decode("utf-8", "ignore").encode() == head[:-4]:
        return ": it is a text file; give an image file"
    return ""


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4096)
