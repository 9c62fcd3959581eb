"""From files, images and text to a loaded model and its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint import (
    checkpoint_folder,
    load_model,
    load_skeleton,
    read_model_type,
)
from .device import pick_device
from .media import decode_image, load_frames, load_image
from .pictures import identified
from .pixels import as_rgb
from .processor import load_processor
from .torchvision_guard import torchvision_works

if TYPE_CHECKING:
    from .image_text_processor import ImageTextProcessor

__all__ = [
    "ImageTextProcessor",
    "as_rgb",
    "checkpoint_folder",
    "decode_image",
    "identified",
    "load_frames",
    "load_image",
    "load_model",
    "load_processor",
    "load_skeleton",
    "pick_device",
    "read_model_type",
    "torchvision_works",
]


def __getattr__(name: str) -> Any:
    # Its base class is transformers', which must not be imported beside a broken torchvision.
    if name != "ImageTextProcessor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    torchvision_works()
    from .image_text_processor import ImageTextProcessor

    return ImageTextProcessor
