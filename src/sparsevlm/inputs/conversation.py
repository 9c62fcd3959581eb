"""Pictures and videos out of chat messages and nested lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .media import eight_bits, load_frames, load_image


def conversation_images(conversations: Sequence[Any]) -> list[Any]:
    """Images of every ``{"type": "image", ...}`` part, in order; paths are read.

    Raises
    ------
    ValueError
        If a picture is an address on the network.
    """
    return _loaded(conversations, "image", load_image)


def conversation_videos(conversations: Sequence[Any]) -> list[Any]:
    """Frames of every ``{"type": "video", ...}`` part, in order; folders are read.

    Raises
    ------
    ValueError
        If a video is an address on the network.
    """
    return _loaded(conversations, "video", load_frames)


def flat_images(images: Any) -> list[Image.Image]:
    """Images from one of them, or a (nested) list of them; PIL images with 8 bits per channel."""
    if images is None:
        return []
    if not isinstance(images, (list, tuple)):
        return [eight_bits(images) if isinstance(images, Image.Image) else images]
    return [image for item in images for image in flat_images(item)]


def flat_videos(videos: Any) -> list[list[Image.Image]]:
    """Lists of frames from one of them, or a (nested) list of them; PIL images with 8 bits per channel."""
    if not videos:
        return []
    if not isinstance(videos[0], (list, tuple)):
        return [flat_images(videos)]
    return [frames for item in videos for frames in flat_videos(item)]


def _loaded(conversations: Sequence[Any], kind: str, load: Callable[[str | Path], Any]) -> list[Any]:
    """What the parts of a kind hold, or name."""
    sources = (part.get(kind, part.get("path", part.get("url"))) for part in _parts(conversations, kind))
    return [load(_local(one)) if isinstance(one, (str, Path)) else one for one in sources if one is not None]


def _parts(conversations: Sequence[Any], kind: str) -> Iterator[Any]:
    for conversation in conversations:
        for message in conversation:
            if not isinstance(content := message.get("content") or [], str):
                yield from (part for part in content if part.get("type") == kind or kind in part)


def _local(source: str | Path) -> str | Path:
    if str(source).startswith(("http://", "https://", "data:")):
        raise ValueError(f"{str(source)[:80]}: pictures are read from local files only; download it first.")
    return source
