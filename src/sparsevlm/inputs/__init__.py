"""From files, pictures and text to a loaded model and its inputs."""

from .checkpoint import (
    SUPPORTED_MODEL_TYPES,
    checkpoint_folder,
    load_model,
    load_skeleton,
    pick_device,
    read_model_type,
)
from .media import as_rgb, decode_image, load_frames, load_image
from .processor import ImageTextProcessor, load_processor
from .torchvision_guard import torchvision_works

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "ImageTextProcessor",
    "as_rgb",
    "checkpoint_folder",
    "decode_image",
    "load_frames",
    "load_image",
    "load_model",
    "load_processor",
    "load_skeleton",
    "pick_device",
    "read_model_type",
    "torchvision_works",
]
