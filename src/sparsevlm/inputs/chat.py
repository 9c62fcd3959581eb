"""Chat messages: which images and videos their parts name, and what is no part of a message here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .media import check_aspect_ratio, decode_image
from .sources import from_base64, shortened
from .visuals import image_size, read_image, read_video

# The keys under which a part may name its image or video.
SOURCES = {"image": ("image", "image_url", "url", "path", "base64"), "video": ("video", "video_url", "url", "path")}
_KINDS = {"image_url": "image", "video_url": "video"}
# What qwen-vl-utils reads from a part. Nothing here or in transformers does.
_PART_OPTIONS = (
    *("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
    *("fps", "nframes", "min_frames", "max_frames", "sample_fps", "video_start", "video_end", "start_time", "end_time"),
)


def read_conversations(conversations: Sequence[Any], *, load: bool) -> list[list[dict[str, Any]]]:
    """Check conversations, and decode what they show.

    Parameters
    ----------
    conversations : list of lists of messages
        A message is ``{"role", "content"}``, its content a text or a list of parts: ``{"type": "text", "text"}``,
        ``{"type": "image", ...}`` with one of ``image``, ``url``, ``path`` (what :func:`flat_images` takes) and
        ``base64``, ``{"type": "image_url", "image_url": {"url"}}``, ``{"type": "video", ...}`` with one of ``video``,
        ``url`` and ``path`` (what :func:`flat_videos` takes), or the like with ``video_url``.
    load : bool
        Whether images and videos are decoded; without, parts may name none.

    Returns
    -------
    list of lists of dict
        The messages, with parts of the types text, image and video. Decoded images are under ``image``, videos under
        ``video``. What was given is not changed.

    Raises
    ------
    TypeError
        If a message or part is not a dict, or holds something of another type.
    ValueError
        If a part is of an unknown kind, or names two sources, or none; or as the loaders.
    FileNotFoundError
        As the loaders.
    """
    return [[_message(message, load) for message in _messages(conversation)] for conversation in conversations]


def _messages(conversation: Any) -> Sequence[Any]:
    messages = getattr(conversation, "messages", conversation)  # pipelines have a class for one
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"a conversation must be a list of messages, got {type(messages).__name__}.")
    return messages


def _message(message: Any, load: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"a message must be a dict with role and content, got {type(message).__name__}.")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise TypeError(f"a message's content must be a text or a list of parts, got {type(content).__name__}.")
    return {**message, "content": [_part(part, load) for part in content]}


def _part(part: Any, load: bool) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise TypeError(f"a part of a message must be a dict with a type, got {type(part).__name__}; see {_shapes()}")
    kind = _kind(part)
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise TypeError(f"a text part must have a text, got {type(part.get('text')).__name__}.")
        return {**part, "type": kind}
    given = {key: part[key] for key in SOURCES[kind] if part.get(key) is not None}
    if len(given) > 1 or (load and not given):
        found = ", ".join(f"{key}={_shown(value)}" for key, value in given.items()) or "none of them"
        raise ValueError(f"a part of type {kind} must have one of {', '.join(SOURCES[kind])}; got {found}.")
    rest = {key: value for key, value in part.items() if key not in SOURCES[kind]}
    if not load:
        return {**rest, "type": kind} if not given else {**rest, "type": kind, kind: next(iter(given.values()))}
    if ignored := [key for key in _PART_OPTIONS if part.get(key) is not None]:
        raise ValueError(
            f"{', '.join(ignored)} of a single part of type {kind} cannot be obeyed; give size and video_metadata in "
            "processor_kwargs, for all images or videos, or resize and cut beforehand."
        )
    return {**rest, "type": kind, kind: _loaded(kind, *given.popitem())}


def _kind(part: Mapping[str, Any]) -> str:
    """Type of a part; one without is of the type whose key it has."""
    kinds = [part["type"]] if "type" in part else [kind for kind in ("text", *SOURCES, *_KINDS) if kind in part]
    if len(kinds) != 1 or (kind := _KINDS.get(str(kinds[0]), str(kinds[0]))) not in ("text", *SOURCES):
        named = " and ".join(map(str, kinds)) or "none of these types"
        raise ValueError(f"a part of a message is {named}; parts may be {_shapes()}")
    return kind


def _loaded(kind: str, key: str, value: Any) -> Any:
    name = f"the {kind} of a message"
    if key in _KINDS:
        value = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(value, str):
            raise TypeError(f"{key} must be an address or a dict with its url, got {type(value).__name__}.")
    if key == "base64":
        image = decode_image(from_base64(value) if isinstance(value, str) else value)
    elif kind == "video":
        return read_video(value, name)
    else:
        image = read_image(value, name)
    check_aspect_ratio(image_size(image), _shown(value) if isinstance(value, str) else name)
    return image


def _shown(value: Any) -> str:
    return shortened(value) if isinstance(value, str) else type(value).__name__


def _shapes() -> str:
    return (
        '{"type": "text", "text": ...}, {"type": "image", "image": ...} (or with url, path or base64), '
        '{"type": "image_url", "image_url": {"url": ...}} and {"type": "video", "video": ...} (or with url or path).'
    )
