"""The downsampling baseline: smaller images, then no pruning."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image


def visual_tokens(image_processor: Any, image: Image.Image) -> int:
    """Number of visual tokens of an image."""
    patches = image_processor.get_number_of_image_patches(image.height, image.width, {})
    return int(patches) // image_processor.merge_size**2


def downsampled(image_processor: Any, images: Sequence[Image.Image], keep: int | float) -> tuple[Image.Image, ...]:
    """Downsamples the images of a sample until their visual tokens fit a budget.

    Each image gets its share of the budget. Its sides become the multiples of ``patch_size * merge_size`` nearest
    to the same aspect that use the most of it; resampling is bicubic, as the image processor's own. The processor's
    lower bound on pixels holds here as well: what it enlarges again shows in the measured number of tokens.

    Parameters
    ----------
    image_processor : Qwen2VLImageProcessor or Qwen2VLImageProcessorPil
    images : sequence of PIL images
    keep : int or float
        Visual tokens of the sample, or a fraction of them.
    """
    counts = [visual_tokens(image_processor, image) for image in images]
    fraction = keep if isinstance(keep, float) else keep / sum(counts)
    if fraction >= 1:
        return tuple(images)
    side = image_processor.patch_size * image_processor.merge_size
    smaller = []
    for image, count in zip(images, counts, strict=True):
        rows, columns = fitting_grid(image.height, image.width, fraction * count)
        smaller.append(image.resize((columns * side, rows * side), Image.Resampling.BICUBIC))
    return tuple(smaller)


def fitting_grid(height: int, width: int, budget: float) -> tuple[int, int]:
    """Largest grid (rows, columns) of an aspect near ``height / width`` with at most ``budget`` cells, at least one.

    Of several the grid nearest to the aspect.
    """
    most = max(1, math.floor(budget + 1e-9))  # the small amount takes back rounding, as in 63.999… for 64
    sides = (math.sqrt(budget * height / width), math.sqrt(budget * width / height))
    nearest = [{min(most, max(1, near)) for near in (math.floor(side + 1e-9), math.ceil(side))} for side in sides]
    fits = [(rows, columns) for rows, columns in itertools.product(*nearest) if rows * columns <= most]
    return max(fits, key=lambda grid: (grid[0] * grid[1], -abs(math.log(grid[0] * width / (grid[1] * height)))))
