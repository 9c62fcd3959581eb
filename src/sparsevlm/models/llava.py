"""The LLaVA line: LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision, and checkpoints of their classes."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import ModelAdapter
from .examples import BlankImage
from .layout import Grid, Layout, Tiles, n_tokens
from .plain import PlainFamily, drops_class_token


@dataclass(frozen=True)
class LlavaFamily(PlainFamily):
    """Tower of one size, or one that cuts images into tiles where the configuration has ``image_grid_pinpoints``.

    Of such, the picture as a whole comes first, then all tiles as one picture without margins, whose rows a newline
    ends; a picture of one tile, and a video, has one newline at its end.
    """

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From the size of the pixels, or of the images where they differ."""
        return self.tower_grids(adapter, inputs)

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """The same; unknown where class tokens stay, or images are cut into tiles."""
        pixels, config, sizes = arguments.get("pixel_values"), adapter.model.config, arguments.get("image_sizes")
        if pixels is None or _is_cut(config):
            return None
        patch = config.vision_config.patch_size
        if sizes is not None:
            return [(1, int(height) // patch, int(width) // patch) for height, width in sizes]
        if not drops_class_token(adapter.model):
            return None
        height, width = (int(length) // patch for length in pixels.shape[-2:])
        return [(1, height, width)] * pixels.shape[0]

    def layouts(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> Sequence[Layout] | None:
        """Of images in tiles from their sizes, of videos from the number of frames."""
        config = adapter.model.config
        if not _is_cut(config):
            return self.grids(adapter, kind, inputs)
        side = config.vision_config.image_size // config.vision_config.patch_size
        pixels = inputs.get(adapter.modalities[kind].pixels)
        if pixels is None or (kind == "image" and inputs.get("image_sizes") is None):
            return None
        if kind == "video":
            pooled = math.ceil(side / 2)
            return [Tiles(((pixels.shape[1], pooled, pooled),), (False,), True)] * pixels.shape[0]
        if _has_class_token(adapter) and not drops_class_token(adapter.model):
            return None
        sizes, module = inputs["image_sizes"].cpu(), sys.modules[type(adapter.base_model).__module__]
        alone = inputs.get("batch_num_images")
        is_cut = [True] * len(sizes) if alone is None else [n == 1 for n in alone.tolist() for _ in range(n)]
        counts = [
            module.image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
            if cut
            else 1
            for size, cut in zip(sizes, is_cut, strict=True)
        ]
        return [_tiles(packed[:, 0], side) for packed in _packed(adapter, counts, sizes, side)]

    def blank_image(self, adapter: ModelAdapter, grid: Grid) -> BlankImage | None:
        """Of the tower's size, or of that among the sizes of cut images whose tokens come near."""
        config = adapter.model.config
        side = getattr(config.vision_config, "image_size", None)
        if side is None:
            return None
        if not _is_cut(config):
            whole = (1, 3, side, side)
            grids = self.grids(adapter, "image", {"pixel_values": torch.empty(whole, device="meta")})
            return None if grids is None else BlankImage(n_tokens(grids[0]), whole, n_tokens(grids[0]))
        found, in_tile = [], (side // config.vision_config.patch_size) ** 2
        for height, width in config.image_grid_pinpoints:
            pixels = (1, 1 + (height // side) * (width // side), 3, side, side)
            given = {"pixel_values": torch.empty(pixels, device="meta"), "image_sizes": torch.tensor([[height, width]])}
            layouts = self.layouts(adapter, "image", given)
            if layouts is None:
                return None
            size, n_tiles = ("image_sizes", (height, width)), pixels[1]
            found.append(BlankImage(n_tokens(layouts[0]), pixels, n_tiles * in_tile, size, n_tiles=n_tiles))
        return min(found, key=lambda image: abs(image.n_visual - math.prod(grid)))

    def patch_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Sequence[tuple[int, int]] | None:
        """Of images that differ in size, which such a tower packs."""
        if (sizes := arguments.get("image_sizes")) is None:
            return None
        patch = adapter.model.config.vision_config.patch_size
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]


def _is_cut(config: Any) -> bool:
    return getattr(config, "image_grid_pinpoints", None) is not None


def _has_class_token(adapter: ModelAdapter) -> bool:
    return any(name.endswith("class_embedding") for name, _ in adapter.vision.module.named_parameters())


def _packed(adapter: ModelAdapter, counts: Sequence[int], sizes: Tensor, side: int) -> Sequence[Tensor]:
    """Tiles without content as the model joins them, one tensor (n, 1) an image, NaN where a newline stands."""
    config, pack = adapter.model.config, adapter.base_model.pack_image_features
    options = {
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    known = inspect.signature(pack).parameters
    tiles = [torch.zeros(count, side * side, 1, device="cpu") for count in counts]
    newline = torch.full((1,), torch.nan, device="cpu")
    return pack(tiles, sizes, image_newline=newline, **{n: v for n, v in options.items() if n in known})[0]


def _tiles(packed: Tensor, side: int) -> Tiles:
    whole: Grid = (1, side, side)
    ends = packed.isnan()
    if packed.shape[0] == side * side + 1:
        return Tiles((whole,), (False,), True)
    width = int(ends[side * side :].nonzero()[0])
    return Tiles((whole, (1, int(ends.sum()), width)), (False, True))
