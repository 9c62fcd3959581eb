"""Frames of a video as patches, made with the image processor alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .media import check_same_size

# Defaults of transformers' Qwen2VLVideoProcessor, which cannot be imported without torchvision.
DEFAULT_VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
DEFAULT_FPS = 24.0


def video_patches(
    image_processor: Any, frames: list[Image.Image], size: dict[str, int]
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cut the frames of one video into patches, as transformers' video processor does.

    Parameters
    ----------
    image_processor : Qwen2VLImageProcessorPil
        Resizes, normalises and cuts one frame.
    frames : list of PIL images
        Of one size; an odd number is filled up by repeating the last one.
    size : dict
        ``shortest_edge`` and ``longest_edge``: bounds on the pixels of a frame.

    Returns
    -------
    patches : float32 array, shape (t * h * w, channels * temporal_patch_size * patch_size²)
    grid : tuple of int
        ``(t, h, w)`` in patches.

    Raises
    ------
    ValueError
        If there are no frames, or frames of different sizes.
    """
    if not frames:
        raise ValueError("a video needs at least one frame.")
    check_same_size(frames)
    depth = image_processor.temporal_patch_size
    frames = [*frames, *[frames[-1]] * (-len(frames) % depth)]
    # One temporal copy per frame: the copies that make up a patch are frames here, not repetitions of a still image.
    cut = image_processor(images=frames, size=size, temporal_patch_size=1, return_tensors="np")
    _, height, width = (int(length) for length in cut["image_grid_thw"][0])
    steps = len(frames) // depth
    pixels = cut["pixel_values"].reshape(steps, depth, height * width, -1, image_processor.patch_size**2)
    patches = pixels.transpose(0, 2, 3, 1, 4).reshape(steps * height * width, -1)
    return patches, (steps, height, width)


def seconds_per_step(metadata: Any, temporal_patch_size: int) -> float:
    """Seconds between two temporal patches, from metadata with ``fps`` and maybe the indices of sampled frames."""
    values = metadata if isinstance(metadata, dict) else vars(metadata) if metadata is not None else {}
    fps = values.get("fps") or DEFAULT_FPS
    total, indices = values.get("total_num_frames"), values.get("frames_indices")
    if values.get("fps") and total and indices is not None:
        fps = len(indices) / total * fps
    return temporal_patch_size / fps
