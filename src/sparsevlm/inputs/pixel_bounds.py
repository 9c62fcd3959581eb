"""Bounds on the pixels of an image, of processors that have them."""

from __future__ import annotations

from typing import Any

_BOUNDS = ("shortest_edge", "longest_edge")


def check_bounded(processor: Any, option: str) -> None:
    """Refuse processors whose sizes are no bounds on pixels, as those of Qwen and GLM are.

    Raises
    ------
    NotImplementedError
        If it has none.
    """
    images = processor.image_processor
    size = getattr(images, "size", None) or {}
    if not hasattr(images, "merge_size") or any(dict(size).get(name) is None for name in _BOUNDS):
        raise NotImplementedError(
            f"{option} needs an image processor that bounds pixels (size with {' and '.join(_BOUNDS)}, and "
            f"merge_size), got {type(images).__name__} with size {dict(size)}. Leave {option} out."
        )


def bound_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Replace the processor's bounds on the pixels of an image or a frame; ``None`` leaves one as it is.

    Raises
    ------
    NotImplementedError
        If it has none.
    """
    bounds = {name: value for name, value in zip(_BOUNDS, (least, most), strict=True) if value is not None}
    if bounds:
        check_bounded(processor, "min_pixels and max_pixels")
    for owner in (processor.image_processor, getattr(processor, "video_processor", None)):
        if owner is not None and (size := owner.size) is not None:
            owner.size = type(size)(**{**dict(size), **bounds})
