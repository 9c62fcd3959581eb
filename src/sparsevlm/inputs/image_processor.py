"""Image processor without torchvision, which works on a GPU where it is asked to."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from .device_pixels import cut, pillow_order, resize, upload


class PilImageProcessor(Qwen2VLImageProcessorPil):
    """transformers' ``Qwen2VLImageProcessorPil`` that takes ``device=``, as its processors over torchvision do.

    With it, images of 8 bits are uploaded as they are, and resized, rescaled, normalised and cut into patches there, to
    the very values that Pillow and numpy give. Other images, and filters other than the bicubic one, go to the device
    when they are done on the host.
    """

    def to_dict(self) -> dict[str, Any]:
        """Settings as transformers' class has them, which reads them back."""
        return {**super().to_dict(), "image_processor_type": "Qwen2VLImageProcessor"}

    def _preprocess(  # type: ignore[override]
        self, images: list[np.ndarray], *args: Any, **options: Any
    ) -> BatchFeature:
        device = options.pop("device", None)
        if not is_elsewhere(device):
            return super()._preprocess(images, *args, **options)
        check_tensors(device, options.get("return_tensors"))
        device, options["return_tensors"] = torch.device(device), "pt"
        is_known = not options["do_resize"] or (
            options["resample"] == Image.Resampling.BICUBIC and pillow_order() is not None
        )
        if not is_known or any(image.dtype != np.uint8 for image in images):
            return super()._preprocess(images, *args, **options).to(device)
        return self._on_device(images, device, options)

    def _on_device(self, images: list[np.ndarray], device: torch.device, options: dict[str, Any]) -> BatchFeature:
        """Images of 8 bits."""
        side, merge_size = options["patch_size"], options["merge_size"]
        table, by_shape = self._table(images[0].shape[0], options).to(device), dict[tuple[int, ...], list[int]]()
        for i, image in enumerate(images):
            by_shape.setdefault(image.shape, []).append(i)
        patches, grids = dict[int, torch.Tensor](), dict[int, tuple[int, int, int]]()
        for members in by_shape.values():
            frames = upload([images[i] for i in members], device)
            if options["do_resize"]:
                frames = self._resized(frames, options)
            parts = cut(frames, table, side, merge_size, options["temporal_patch_size"])
            patches |= dict(zip(members, parts, strict=True))
            grids |= dict.fromkeys(members, (1, frames.shape[1] // side, frames.shape[2] // side))
        order = range(len(images))
        pixels = patches[0] if len(images) == 1 else torch.cat([patches[i] for i in order])
        return BatchFeature({"pixel_values": pixels, "image_grid_thw": torch.tensor([grids[i] for i in order])})

    def _table(self, n_channels: int, options: dict[str, Any]) -> torch.Tensor:
        """What each value of 8 bits becomes, (n_channels, 256), by the functions that compute it on the host."""
        values: Any = np.arange(256, dtype=np.uint8)[None, None].repeat(n_channels, axis=0)
        if options["do_rescale"]:
            values = self.rescale(values, options["rescale_factor"])
        if options["do_normalize"]:
            values = self.normalize(values, options["image_mean"], options["image_std"])
        return torch.from_numpy(np.asarray(values[:, 0], dtype=np.float32))

    def _resized(self, frames: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        size, order, factor = options["size"], pillow_order(), options["patch_size"] * options["merge_size"]
        assert order is not None  # else on the host
        _, height, width, _ = frames.shape
        height, width = smart_resize(height, width, factor, size.shortest_edge, size.longest_edge)
        return resize(frames, height, width, order)


def is_elsewhere(device: Any) -> bool:
    """Tells whether the work goes to a device; on the CPU Pillow does it."""
    return device is not None and torch.device(device).type != "cpu"


def check_tensors(device: Any, return_tensors: Any) -> None:
    """Refuse arrays that would have to come back from a device.

    Raises
    ------
    ValueError
    """
    if return_tensors not in ("pt", None):
        raise ValueError(
            f"device={str(device)!r} gives tensors of torch, and return_tensors={str(return_tensors)!r} asks for "
            'others; leave device out, or pass return_tensors="pt".'
        )
