"""Sources of images and videos: a path, a ``file://`` or ``data:`` address, base64. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path

# Two letters or more: one is a drive. A Path has already merged the slashes of an address.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
# Base64 of the bytes with which PNG, JPEG, GIF, WebP, BMP and TIFF files begin: a path looks much like base64, too.
_BASE64 = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK)[A-Za-z0-9+/_\s-]{40,}={0,2}\s*")


def resolve(source: str | os.PathLike[str]) -> Path | bytes:
    """Return the path that a source names, or the bytes that it holds.

    Parameters
    ----------
    source : str or Path
        A path, a ``file://`` address (percent-encoded or not), a ``data:`` address, or base64 of an image file.

    Raises
    ------
    ValueError
        If it is an address on the network, or a ``data:`` address is malformed.
    """
    text = os.fspath(source)
    if text.startswith("data:"):
        return _data(text)
    if text.startswith("file:"):
        return _file(text)
    if _SCHEME.match(text):
        raise ValueError(
            f"{shortened(text)} is on the network; download it and give its path: only local files are read, and "
            "nothing is fetched."
        )
    if _BASE64.fullmatch(text) and not os.path.exists(text):
        return from_base64(text)
    return Path(source)


def from_base64(text: str) -> bytes:
    """Decode base64, of either alphabet and with or without padding; a ``data:`` address is taken, too.

    Raises
    ------
    ValueError
        If it is not base64.
    """
    if text.startswith("data:"):
        return _data(text)
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{shortened(text)} is not base64 ({error}); encode the bytes of an image file.") from error


def shortened(text: str) -> str:
    """A source as messages show it: at most 80 characters."""
    return text if len(text) <= 80 else f"{text[:37]}...{text[-40:]}"  # a file's name stands at the end


def _data(text: str) -> bytes:
    head, comma, content = text.partition(",")
    if not comma:
        raise ValueError(f"{shortened(text)} has no comma; a data: address is data:image/png;base64,...")
    return from_base64(_decoded(content).decode("utf-8", "replace")) if "base64" in head else _decoded(content)


def _file(text: str) -> Path:
    host, path = re.match(r"file:(?://([^/]*))?(.*)", text, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    if host not in (None, "", "localhost"):
        raise ValueError(f"{shortened(text)} is on the host {host}; give a file of this machine, file:///folder/name.")
    return Path(os.fsdecode(_decoded(path.lstrip("/") if os.name == "nt" else path)))


def _decoded(text: str) -> bytes:
    """Undo percent-encoding."""
    return re.sub(rb"%([0-9A-Fa-f]{2})", lambda code: bytes.fromhex(code[1].decode()), os.fsencode(text))
