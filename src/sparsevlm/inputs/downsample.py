"""The downsampling baseline: smaller images, then no pruning."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from PIL import Image

from ..models import ModelAdapter
from ..request.counting import visual_counts
from .turns import process, render_turn

Sizes = tuple[tuple[int, int], ...]


def visual_tokens(image_processor: Any, image: Image.Image) -> int:
    """Number of visual tokens of an image."""
    patches = image_processor.get_number_of_image_patches(image.height, image.width, {})
    return int(patches) // image_processor.merge_size**2


def cuts_grids(image_processor: Any) -> bool:
    """Tells whether the sides of an image decide its grid of visual tokens, in multiples of one length."""
    return all(hasattr(image_processor, name) for name in ("merge_size", "patch_size", "get_number_of_image_patches"))


def downsampled(
    image_processor: Any, images: Sequence[Image.Image], keep: int | float, counts: Sequence[int] | None = None
) -> tuple[Image.Image, ...]:
    """Downsamples the images of a sample until their visual tokens fit a budget.

    Each image gets its share of the budget. Its sides become the multiples of ``patch_size * merge_size`` nearest
    to the same aspect that use the most of it; resampling is bicubic, as the image processor's own. The processor's
    lower bound on pixels holds here as well: what it enlarges again shows in the measured number of tokens.

    Parameters
    ----------
    image_processor : ImageProcessor
        One that cuts grids, such as Qwen2VLImageProcessor.
    images : sequence of PIL images
    keep : int or float
        Visual tokens of the sample, or a fraction of them.
    counts : sequence of int, optional
        Visual tokens that each image has otherwise; what the processor makes of it where omitted.
    """
    if counts is None:
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


class Downsampler:
    """Downsamples images by what the processor does with their sizes.

    Parameters
    ----------
    adapter : ModelAdapter
    processor : ProcessorMixin
    """

    def __init__(self, adapter: ModelAdapter, processor: Any) -> None:
        self._processor, self._count = processor, VisualCounter(adapter, processor)

    def __call__(
        self, images: Sequence[Image.Image], keep: int | float, counts: Sequence[int] | None = None
    ) -> tuple[Image.Image, ...]:
        """Downsamples the images of a sample; see :func:`downsampled` and :func:`scaled_to_fit`.

        ``counts`` is for processors that cut grids.
        """
        if cuts_grids(self._processor.image_processor):
            return downsampled(self._processor.image_processor, images, keep, counts)
        return scaled_to_fit(self._count, images, keep)

    def unsupported_reason(self) -> str | None:
        """Why smaller images are no baseline for this processor, or ``None``."""
        return self._count.unsupported_reason()


class VisualCounter:
    """Counts the visual tokens that a processor makes of images, by their sizes.

    Parameters
    ----------
    adapter : ModelAdapter
    processor : ProcessorMixin
    """

    def __init__(self, adapter: ModelAdapter, processor: Any) -> None:
        self._adapter, self._processor = adapter, processor
        self._count = lru_cache(maxsize=1024)(self._count_blank)

    def __call__(self, sizes: Sizes) -> int:
        """Visual tokens of one prompt with images of these widths and heights."""
        return self._count(sizes)

    def unsupported_reason(self) -> str | None:
        """Why smaller images are no baseline for this processor, or ``None``."""
        if cuts_grids(self._processor.image_processor):
            return None
        n_visual = self(((1280, 960),))
        if n_visual > self(((40, 30),)):
            return None
        return f"{type(self._processor).__name__} makes {n_visual} visual tokens of a picture of any size"

    def _count_blank(self, sizes: Sizes) -> int:
        content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "x"}]
        prompt = render_turn(self._processor, [{"role": "user", "content": content}])
        blank = [Image.new("RGB", size) for size in sizes]
        (count,) = visual_counts(self._adapter, process(self._processor, [prompt], [blank]))
        return count


def scaled_to_fit(
    count: Callable[[Sizes], int], images: Sequence[Image.Image], keep: int | float
) -> tuple[Image.Image, ...]:
    """Downsamples the images of a sample by one factor, the largest at which their visual tokens fit a budget.

    For processors that cut images into tiles. Where the least that they make is more than the budget, that is taken,
    and shows in the measured number of tokens.

    Parameters
    ----------
    count : callable
        ``count(sizes)`` gives the visual tokens of images of these widths and heights.
    images : sequence of PIL images
    keep : int or float
        Visual tokens of the sample, or a fraction of them.

    """
    sizes = tuple(image.size for image in images)
    n_visual = count(sizes)
    budget = keep if isinstance(keep, int) else math.floor(keep * n_visual + 1e-9)
    if budget >= n_visual:
        return tuple(images)
    # Factors from 1 / 64 to 1, of which each is four percent larger than the one before.
    scales = [_scaled(sizes, 64 ** (step / 106 - 1)) for step in range(107)]
    least = count(scales[0])
    if least == n_visual:  # as of several images where only single ones are cut
        return tuple(images)
    most = bisect.bisect_right(scales, max(budget, least), key=count) - 1
    smaller = scales[max(most, 0)]
    return tuple(image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(images, smaller, strict=True))


def _scaled(sizes: Sizes, factor: float) -> Sizes:
    return tuple((max(1, round(width * factor)), max(1, round(height * factor))) for width, height in sizes)


def fitting_grid(height: int, width: int, budget: float) -> tuple[int, int]:
    """Largest grid (rows, columns) of an aspect near ``height / width`` with at most ``budget`` cells, at least one.

    Of several the grid nearest to the aspect.
    """
    most = max(1, math.floor(budget + 1e-9))  # the small amount takes back rounding, as in 63.999… for 64
    sides = (math.sqrt(budget * height / width), math.sqrt(budget * width / height))
    nearest = [{min(most, max(1, near)) for near in (math.floor(side + 1e-9), math.ceil(side))} for side in sides]
    fits = [(rows, columns) for rows, columns in itertools.product(*nearest) if rows * columns <= most]
    return max(fits, key=lambda grid: (grid[0] * grid[1], -abs(math.log(grid[0] * width / (grid[1] * height)))))
