"""Sizes of a request's images: a fixed number of visual tokens, and the downsampling baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..inputs.downsample import Downsampler
from ..models import ModelAdapter
from .lmms_inputs import nearest_grid, token_side, with_n_visual


class ImageSizes:
    """Resizes the images of a request before the processor sees them.

    Parameters
    ----------
    adapter : ModelAdapter
    processor : ProcessorMixin
    n_visual : int or None
        Visual tokens that every image gets, as near as its aspect allows.
    downsample : int, float or None
        Visual tokens that the images of a request may have together, or a fraction of what they would have.

    Raises
    ------
    NotImplementedError
        If the processor makes as many visual tokens of an image of any size.
    """

    def __init__(
        self, adapter: ModelAdapter, processor: Any, n_visual: int | None, downsample: int | float | None
    ) -> None:
        self._n_visual, self._keep = n_visual, downsample
        self._side = None if n_visual is None else token_side(processor)
        self._downsample = Downsampler(adapter, processor)
        if downsample is not None and (reason := self._downsample.unsupported_reason()):
            raise NotImplementedError(f"selector=downsample makes images smaller, and {reason}. Choose another one.")

    @property
    def for_images_only(self) -> str | None:
        """The argument that leaves no room for videos, or ``None``."""
        if self._n_visual is not None:
            return "n_visual"
        return None if self._keep is None else "selector=downsample"

    def __call__(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Resize the images of one request, each from its own pixels and once."""
        if not images or (self._side is None and self._keep is None):
            return list(images)
        if self._n_visual is None or self._side is None:
            assert self._keep is not None
            return list(self._downsample(images, self._keep))
        counts = [math.prod(nearest_grid(image.width, image.height, self._n_visual)) for image in images]
        if self._keep is not None and self._share(counts) < 1:
            return list(self._downsample(images, self._keep, counts))
        return [with_n_visual(image, self._n_visual, self._side) for image in images]

    def _share(self, counts: Sequence[int]) -> float:
        assert self._keep is not None
        return self._keep if isinstance(self._keep, float) else self._keep / sum(counts)
