"""From the messages of lmms-eval's chat tasks to the inputs of a batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..inputs import as_rgb, load_frames, load_image
from ..inputs.decoding import check_is_file
from ..inputs.media import rgb_frames
from ..inputs.pixel_bounds import check_bounded
from ..inputs.sources import resolve
from ..inputs.turns import process, render_turn

# Frames per second that a folder or list of frames is taken to have: that of Qwen's own sampling.
FRAMES_PER_SECOND = 2.0


@dataclass(frozen=True)
class Clip:
    """Frames of a video, and where in it they were: their indices among ``n_total`` at ``fps``."""

    frames: list[Image.Image]
    indices: list[int]
    n_total: int
    fps: float


@dataclass(frozen=True)
class Conversation:
    """Messages with placeholders, and what belongs to these in order."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    clips: list[Clip]


def read_conversation(messages: Sequence[Mapping[str, Any]], max_num_frames: int) -> Conversation:
    """Read the pictures and videos of one request.

    Parameters
    ----------
    messages : sequence of dict
        ``{"role", "content"}``; content is text, or a list of ``{"type": "text", "text"}``,
        ``{"type": "image", "url"}`` (PIL image or local file) and ``{"type": "video", "url"}`` (local video file,
        folder of frames, list of PIL images).
    max_num_frames : int
        Frames that are taken from a video file.

    Raises
    ------
    NotImplementedError
        For other kinds of content, such as audio.
    ValueError, FileNotFoundError
        If a picture or video cannot be read.
    """
    found = Conversation([], [], [])
    for message in messages:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        placeholders: list[dict[str, Any]] = []
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                placeholders.append({"type": "text", "text": part["text"]})
                continue
            if kind == "image":
                found.images.append(_image(part.get("url")))
            elif kind == "video":
                found.clips.append(_clip(part, max_num_frames))
            else:
                raise NotImplementedError(f"messages may hold text, images and videos, got a part of type {kind!r}.")
            placeholders.append({"type": kind})
        found.messages.append({"role": message["role"], "content": placeholders})
    return found


def batch_inputs(processor: Any, conversations: Sequence[Conversation]) -> Any:
    """Left-padded inputs of a batch.

    Returns
    -------
    BatchFeature
    """
    metadata = [
        {"fps": clip.fps, "total_num_frames": clip.n_total, "frames_indices": clip.indices}
        for one in conversations
        for clip in one.clips
    ]
    texts = [render_turn(processor, one.messages) for one in conversations]
    images = [one.images for one in conversations]
    return process(processor, texts, images, [[clip.frames for clip in one.clips] for one in conversations], metadata)


def nearest_grid(width: int, height: int, n_visual: int) -> tuple[int, int]:
    """Columns and rows of visual tokens whose product is nearest to a number, with the aspect kept.

    Both sides are those of the ideal grid rounded down or up; of the products that are equally near, the one with the
    nearer aspect is taken.
    """

    def whole(side: float) -> list[int]:
        return [min(n_visual, max(1, near)) for near in (math.floor(side), math.ceil(side))]

    def distance(grid: tuple[int, int]) -> tuple[int, float]:
        columns, rows = grid
        return abs(columns * rows - n_visual), abs(math.log(columns * height / (rows * width)))

    ideal = math.sqrt(n_visual * width / height), math.sqrt(n_visual * height / width)
    return min(itertools.product(whole(ideal[0]), whole(ideal[1])), key=distance)


def with_n_visual(image: Image.Image, n_visual: int, side: int) -> Image.Image:
    """Resize a picture so that it becomes about ``n_visual`` tokens of ``side`` × ``side`` pixels."""
    columns, rows = nearest_grid(image.width, image.height, n_visual)
    return image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)


def token_side(processor: Any) -> int:
    """Pixels per side of what becomes one visual token.

    Raises
    ------
    NotImplementedError
        If the processor does not turn any multiple of that into a grid of as many tokens.
    """
    check_bounded(processor, "n_visual")
    return int(processor.image_processor.patch_size * processor.image_processor.merge_size)


def _image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return as_rgb(source, name="an image of a message")
    if isinstance(source, (str, Path)):
        return load_image(source)
    raise TypeError(f"an image must be a PIL image or the path of a file, got {type(source).__name__}.")


def _clip(part: Mapping[str, Any], max_num_frames: int) -> Clip:
    source = part.get("url")
    if isinstance(source, dict) or part.get("start_time") is not None or part.get("end_time") is not None:
        raise NotImplementedError("videos with a start and an end are not supported: cut the clip out beforehand.")
    if isinstance(source, (list, tuple)) and source and all(isinstance(frame, Image.Image) for frame in source):
        return _numbered(rgb_frames(source, "a video of a message"))
    if not isinstance(source, (str, Path)):
        raise TypeError(f"a video must be a local file, a folder or a list of PIL images, got {type(source).__name__}.")
    path = resolve(source)
    if isinstance(path, bytes) or path.is_dir():
        return _numbered(load_frames(source))
    check_is_file(path, f"video {path}", noun="a video", wanted="a video file or a folder of frames")
    return _decoded(path, max_num_frames)


def _numbered(frames: list[Image.Image]) -> Clip:
    return Clip(frames, list(range(len(frames))), len(frames), FRAMES_PER_SECOND)


def _decoded(path: Path, max_num_frames: int) -> Clip:
    """Frames of a video file, evenly spread over it."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"decoding {path} needs PyAV, which comes with lmms-eval: pip install av.") from error
    try:
        with av.open(str(path)) as video:
            fps = float(video.streams.video[0].average_rate or FRAMES_PER_SECOND)
            # Counted by decoding: the number in a file's header is missing or wrong too often.
            n_total = sum(1 for _ in video.decode(video=0))
        n_taken = min(max_num_frames, n_total)
        indices = [i * (n_total - 1) // max(n_taken - 1, 1) for i in range(n_taken)]
        wanted = set(indices)
        with av.open(str(path)) as video:
            frames = [frame.to_image() for i, frame in enumerate(video.decode(video=0)) if i in wanted]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} is not a video that can be decoded: {error}.") from error
    if not frames:
        raise ValueError(f"{path} holds no frames.")
    return Clip(frames, indices, n_total, fps)
