"""Images and videos as a processor is given them, in any nesting, to flat lists of decoded ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .decoding import decode
from .media import check_aspect_ratio, decode_image, load_frames, load_image, rgb_frames
from .pixels import as_rgb
from .sources import resolve, shortened

IMAGES_ARE = "a PIL image, a path, the bytes of an image file, or an array of (height, width, channels)"
VIDEOS_ARE = (
    "a list of frames, a folder of images, an animated image file, or an array of (frames, height, width, channels)"
)
_CHANNEL_AXES = {"channels_first": 0, "channels_last": 2}


def flat_images(images: Any, input_data_format: Any = None) -> list[Any]:
    """Decode images from one of them, or from a nested list of them.

    Parameters
    ----------
    images : object
        ``None``, an image, or a (nested) list of images: each a PIL image (the frame at which it stands), a path, a
        ``file://`` or ``data:`` address, the bytes of a file, or an array or tensor of (height, width, channels) or
        (channels, height, width). An array with one more dimension is a list.
    input_data_format : {"channels_first", "channels_last"}, optional
        Of arrays; found by their shape where omitted.

    Returns
    -------
    list
        PIL images of 8-bit RGB, and numpy arrays of shape (3, height, width).

    Raises
    ------
    TypeError
        If something is no image.
    FileNotFoundError, ValueError
        If an image cannot be read, or an array has another shape, or values of more than 8 bits.
    """
    return [read_image(one, f"image {number}", input_data_format) for number, one in enumerate(each_image(images), 1)]


def flat_videos(videos: Any, input_data_format: Any = None) -> list[np.ndarray]:
    """Decode videos from one of them, or from a nested list of them.

    Parameters
    ----------
    videos : object
        ``None``, a video, or a (nested) list of videos: each a list of images, a path or address as :func:`load_frames`
        takes it, or an array of four dimensions; an array of five is a list. Paths in one list are videos; in a list
        within a list they are frames, unless they are folders.
    input_data_format : {"channels_first", "channels_last"}, optional
        Of arrays; found by their shape where omitted.

    Returns
    -------
    list of arrays
        Each of shape (frames, 3, height, width).

    Raises
    ------
    TypeError
        If something is no video.
    FileNotFoundError, ValueError
        If a video cannot be read, has no frames, or frames of different sizes.
    """
    return [read_video(one, f"video {number}", input_data_format) for number, one in enumerate(_videos_in(videos), 1)]


def read_image(source: Any, name: str, input_data_format: Any = None) -> Any:
    """Decode one image as :func:`flat_images` takes and returns it; ``name`` is what messages call it.

    Raises
    ------
    TypeError, FileNotFoundError, ValueError
        As :func:`flat_images`.
    """
    if isinstance(source, Image.Image):
        return as_rgb(source, name=name)
    if isinstance(source, (str, os.PathLike)):
        return load_image(source)
    if isinstance(source, (bytes, bytearray)):
        return decode_image(bytes(source))
    if _n_dims(source) is not None:
        return _three_channels(_as_numpy(source), name, input_data_format)
    raise TypeError(f"{name} must be {IMAGES_ARE}, got {type(source).__name__}.")


def read_video(source: Any, name: str, input_data_format: Any = None) -> np.ndarray:
    """Decode one video as :func:`flat_videos` takes and returns it; a list holds its frames, which may be paths.

    Raises
    ------
    TypeError, FileNotFoundError, ValueError
        As :func:`flat_videos`.
    """
    if isinstance(source, (str, os.PathLike)):
        return _stacked(load_frames(source))
    if isinstance(source, Image.Image) or _n_dims(source) == 3:
        source = [source]
    elif _n_dims(source) == 4:
        source = list(_as_numpy(source))
    if not isinstance(source, (list, tuple)):
        raise TypeError(f"{name} must be {VIDEOS_ARE}, got {type(source).__name__}.")
    if not source:
        raise ValueError("a video needs at least one frame.")
    frames = [_frame(frame, f"frame {number} of {name}", input_data_format) for number, frame in enumerate(source)]
    if all(isinstance(frame, Image.Image) for frame in frames):
        return _stacked(rgb_frames(frames, name))
    if any(isinstance(frame, Image.Image) for frame in frames):
        raise TypeError(f"{name} mixes arrays with other frames; give frames of one kind.")
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise ValueError(f"the frames of a video must be of one size, got arrays of {sorted(sizes)}.")
    return np.stack(frames)


def image_size(image: Any) -> tuple[int, int]:
    """Width and height of what :func:`flat_images` returns."""
    return image.size if isinstance(image, Image.Image) else (image.shape[2], image.shape[1])


def check_visuals(visuals: Sequence[Any], noun: str, *, is_resized: bool, is_rescaled: bool, multiple: int) -> None:
    """Raise where the size of an image cannot be processed, and warn where its values would come out black.

    Parameters
    ----------
    visuals : sequence
        Of what :func:`flat_images` returns, or one frame per video.
    noun : str
        What messages call one of them.
    is_resized, is_rescaled : bool
        Whether sides are fitted to the model, and values multiplied by 1 / 255.
    multiple : int
        Of which the sides must be multiples if they are not resized, in pixels.

    Raises
    ------
    ValueError
        If the sides are too unlike, or no multiples.
    """
    for number, visual in enumerate(visuals, 1):
        name, size = f"{noun} {number}", image_size(visual)
        if is_resized:
            check_aspect_ratio(size, name)
        elif any(side % multiple for side in size):
            raise ValueError(
                f"{name} has {size[0]}x{size[1]} pixels, and do_resize=False takes multiples of {multiple}; resize it."
            )
        if is_rescaled and isinstance(visual, np.ndarray) and visual.dtype.kind == "f" and 0 < visual.max() <= 1:
            warnings.warn(
                f"sparsevlm: {name} is an array of floats up to 1 where values up to 255 are expected: it will be "
                "nearly black; pass do_rescale=False.",
                stacklevel=4,
            )


def each_image(images: Any) -> Iterator[Any]:
    """Go through the images of a nested list without decoding them."""
    if images is None:
        return
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from each_image(image)
    elif _n_dims(images) == 4:
        yield from images
    else:
        yield images


def _videos_in(videos: Any) -> Iterator[Any]:
    if videos is None:
        return
    if _n_dims(videos) == 5:
        yield from videos
    elif not isinstance(videos, (list, tuple)) or (videos and _is_frame(videos[0])):
        yield videos
    else:
        for video in videos:
            if isinstance(video, (list, tuple)) and video and _is_frame_file(video[0]):
                yield video
            else:
                yield from _videos_in(video)


def _is_frame(source: Any) -> bool:
    return isinstance(source, (Image.Image, bytes, bytearray)) or _n_dims(source) == 3


def _is_frame_file(source: Any) -> bool:
    if not isinstance(source, (str, os.PathLike)):
        return False
    content = resolve(source)
    return not isinstance(content, Path) or not os.path.isdir(content)


def _n_dims(source: Any) -> int | None:
    """Dimensions of an array or tensor; ``None`` for anything else."""
    return None if isinstance(source, Image.Image) else getattr(source, "ndim", None)


def _frame(source: Any, name: str, input_data_format: Any) -> Any:
    """Decode a frame without changing its depth, which all frames of a video share."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        return decode(resolve(source), shortened(os.fspath(source)))
    if isinstance(source, (bytes, bytearray)):
        return decode(bytes(source), name)
    if _n_dims(source) == 3:
        return _three_channels(_as_numpy(source), name, input_data_format)
    raise TypeError(f"{name} must be {IMAGES_ARE}, got {type(source).__name__}.")


def _stacked(frames: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames]).transpose(0, 3, 1, 2)


def _as_numpy(source: Any) -> np.ndarray:
    """An array, or a tensor of any device and dtype, as a numpy array."""
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() else source
    return np.asarray(source)


def _three_channels(values: np.ndarray, name: str, input_data_format: Any) -> np.ndarray:
    """Check an array, and bring it to (3, height, width), transparency composited onto white."""
    axis = _channel_axis(values, name, input_data_format)
    is_float = np.issubdtype(values.dtype, np.floating)
    if values.dtype == bool or values.max(initial=0) > 255 or (values.min(initial=0) < 0 and not is_float):
        raise ValueError(
            f"{name} is an array of {values.dtype} from {values.min()} to {values.max()}; scale it to 0 to 255."
        )
    values = np.moveaxis(values, axis, 0)
    if len(values) == 1:
        return np.repeat(values, 3, axis=0)
    if len(values) == 3:
        return values
    white = 1.0 if is_float and values.max(initial=0) <= 1 else 255
    alpha = values[3:] / white
    blended = alpha * values[:3] + (1 - alpha) * white
    return (blended if is_float else blended.round()).astype(values.dtype)


def _channel_axis(values: np.ndarray, name: str, input_data_format: Any) -> int:
    if values.ndim == 3 and values.size and input_data_format is not None:
        axis = _CHANNEL_AXES.get(str(getattr(input_data_format, "value", input_data_format)))
        if axis is not None and values.shape[axis] in (1, 3, 4):
            return axis
    elif values.ndim == 3 and values.size:
        # As transformers, the first dimension where both may be; but colours before a side of one or four pixels.
        for n_channels in ((3,), (1, 4)):
            for axis in (0, 2):
                if values.shape[axis] in n_channels:
                    return axis
    raise ValueError(
        f"{name} must be an array of (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels, "
        f"got {values.shape} with input_data_format={input_data_format!r}."
    )
