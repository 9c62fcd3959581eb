"""Resizing and cutting of images on a device, to the very values that Pillow and transformers give on the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Pillow's coefficients are whole numbers, times 2**-22.
_PRECISION = 22
_BICUBIC_SUPPORT, _BICUBIC_A = 2.0, -0.5
# Numbers that a pass holds at once, four bytes each.
_MOST_NUMBERS = 1 << 26


def bicubic_taps(n_in: int, n_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Places and coefficients of Pillow's antialiased bicubic filter (``precompute_coeffs`` in its ``Resample.c``).

    Parameters
    ----------
    n_in, n_out : int
        Pixels along one axis, before and after.

    Returns
    -------
    places : array of shape (n_taps, n_out), int64
    coefficients : array of shape (n_taps, n_out), int32
        Times 2**-22; 0 beyond the borders.
    """
    scale = n_in / n_out
    stretch = max(1.0, scale)
    support = _BICUBIC_SUPPORT * stretch
    center = (np.arange(n_out) + 0.5) * scale
    first = np.maximum(0, np.trunc(center - support + 0.5)).astype(np.int64)
    last = np.minimum(n_in, np.trunc(center + support + 0.5)).astype(np.int64)
    places = first + np.arange(math.ceil(support) * 2 + 1)[:, None]
    x = np.abs((places - center + 0.5) * (1.0 / stretch))
    a = _BICUBIC_A
    near, far = ((a + 2.0) * x - (a + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    values = np.where(places < last, np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0)), 0.0)
    values = values / np.cumsum(values, axis=0)[-1]  # summed in Pillow's order
    rounded = np.trunc(values * (1 << _PRECISION) + np.where(values < 0, -0.5, 0.5)).astype(np.int32)
    used = rounded.any(axis=1)
    return places.clip(max=n_in - 1)[used], rounded[used]


@lru_cache(maxsize=64)
def _taps_on(n_in: int, n_out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    places, coefficients = (torch.from_numpy(part).to(device) for part in bicubic_taps(n_in, n_out))
    return places, coefficients


def _none_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Of Pillow up to 12.1."""
    return False


def _tall_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Of Pillow 12.2 and 12.3."""
    return height > 100 * width and to_height < height


def _steep_first(width: int, height: int, to_width: int, to_height: int) -> bool:
    """Of Pillow 13."""
    return to_height < height and height - to_height > 2 * (width - to_width)


Order = Callable[[int, int, int, int], bool]
# Width and height, before and after, which tell these rules apart.
_PROBES = ((8, 8, 12, 6), (16, 20, 8, 18), (12, 30, 10, 20), (8, 8, 6, 12), (10, 19, 85, 126), (3, 310, 2, 305))


@cache
def pillow_order() -> Order | None:
    """Which images the installed Pillow resizes along their height first, since it rounds between the axes.

    Returns
    -------
    callable or None
        ``order(width, height, to_width, to_height)``, tried against Pillow on a few small images; ``None``: it has
        another rule than those that are known.
    """
    values = 255 * np.random.default_rng(0).integers(0, 2, (310, 16, 3))
    for order in (_steep_first, _tall_first, _none_first):
        for width, height, *after in _PROBES:
            image = values[:height, :width].astype(np.uint8)
            wanted = np.asarray(Image.fromarray(image).resize((after[0], after[1]), Image.Resampling.BICUBIC))
            found = resize(torch.from_numpy(image)[None], after[1], after[0], order)[0]
            if not np.array_equal(found.numpy(), wanted):
                break
        else:
            return order
    return None


def resize(frames: Tensor, height: int, width: int, order: Order) -> Tensor:
    """Resize images as Pillow's ``resize`` does with its bicubic filter, to the same values.

    Parameters
    ----------
    frames : Tensor of shape (n, height, width, channels), uint8
    height, width : int
        Afterwards.
    order : callable
        See :func:`pillow_order`.

    Returns
    -------
    Tensor of shape (n, height, width, channels), uint8
    """
    before = frames.shape[2], frames.shape[1]
    sides = {1: height, 2: width}
    axes = (1, 2) if order(*before, width, height) else (2, 1)
    largest = max(before[0], width) * max(before[1], height) * frames.shape[3]
    parts = []
    for part in frames.split(max(1, _MOST_NUMBERS // largest)):
        for axis in axes:
            part = _along(part, axis, sides[axis])  # noqa: PLW2901
        parts.append(part)
    return torch.cat(parts)


def _along(frames: Tensor, axis: int, n_out: int) -> Tensor:
    """Resize along one axis; sums and shifts of whole numbers, as in Pillow, which rounds after each axis."""
    if frames.shape[axis] == n_out:
        return frames
    places, coefficients = _taps_on(frames.shape[axis], n_out, frames.device)
    shape = [-1 if i == axis else 1 for i in range(4)]
    total: Tensor | None = None
    for at, coefficient in zip(places, coefficients, strict=True):
        term = frames.index_select(axis, at).to(torch.int32).mul_(coefficient.view(shape))
        total = term.add_(1 << (_PRECISION - 1)) if total is None else total.add_(term)
    assert total is not None
    return (total >> _PRECISION).clamp_(0, 255).to(torch.uint8)


def cut(frames: Tensor, table: Tensor, patch_size: int, merge_size: int, depth: int) -> Tensor:
    """Look values up, and cut images into patches as transformers' ``Qwen2VLImageProcessor`` orders them.

    Parameters
    ----------
    frames : Tensor of shape (n, height, width, channels), uint8
        Sides are multiples of ``patch_size * merge_size``.
    table : Tensor of shape (channels, 256), float32
        What each value of 8 bits becomes.
    patch_size, merge_size : int
    depth : int
        Copies of every image in a patch.

    Returns
    -------
    Tensor of shape (n, patches, channels * depth * patch_size²), float32
    """
    n, height, width, channels = frames.shape
    first = torch.arange(channels, dtype=torch.int32, device=frames.device) * table.shape[1]
    values = table.flatten().index_select(0, (frames.to(torch.int32) + first).flatten())
    side, merged = patch_size, patch_size * merge_size
    grid = (n, height // merged, merge_size, side, width // merged, merge_size, side, channels)
    patches = values.view(grid).permute(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]
    patches = patches.expand(*[-1] * 6, depth, -1, -1)
    return patches.reshape(n, height * width // side**2, channels * depth * side**2)


def upload(frames: list[np.ndarray], device: torch.device) -> Tensor:
    """Images of one size, (channels, height, width), uint8, on a device: (n, height, width, channels)."""
    channels, height, width = frames[0].shape
    on_host = torch.empty((len(frames), height, width, channels), dtype=torch.uint8, pin_memory=device.type == "cuda")
    for one, frame in zip(on_host, frames, strict=True):
        one.copy_(torch.from_numpy(np.ascontiguousarray(frame.transpose(1, 2, 0))))
    return on_host.to(device, non_blocking=True)
