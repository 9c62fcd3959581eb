"""Families whose inputs bring the grid of patches, (t, h, w), of each image and video, as Qwen's do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from .base import Family, Modality, ModelAdapter
from .examples import BlankImage, blank_inputs, blank_word
from .layout import Grid, Layout, grid_coordinates, n_tokens
from .tower import PackedTower, TowerBlock, Vision


class GriddedFamily(Family):
    """M-RoPE, and a tower over packed patches, some with windows."""

    def tower(self, model: Any) -> Any:
        """The module of the vision tower."""
        return self.base_model(model).visual

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model, by its own modules."""
        tower = self.tower(model)
        named = getattr(tower, "fullatt_block_indexes", None)  # without windows every block has full attention
        full = [i for i in range(len(tower.blocks)) if named is None or i in named]
        return Vision(
            module=tower,
            readable=tuple((i, tower.blocks[i].attn) for i in full),
            n_blocks=len(tower.blocks),
            patches_per_token=model.config.vision_config.spatial_merge_size**2,
            blocks=tuple(tower.blocks),
        )

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images and videos."""
        return {
            "image": Modality("pixel_values", model.config.image_token_id, ("image_grid_thw",)),
            "video": Modality("pixel_values_videos", model.config.video_token_id, ("video_grid_thw",)),
        }

    def grids(self, adapter: ModelAdapter, kind: str, inputs: Mapping[str, Any]) -> list[Grid] | None:
        """From ``image_grid_thw`` and ``video_grid_thw``."""
        return _merged(adapter, inputs.get(f"{kind}_grid_thw"))

    layouts = grids  # an image is one grid

    def blank_image(self, adapter: ModelAdapter, grid: Grid) -> BlankImage:
        """Of this very size."""
        config, word = adapter.model.config, blank_word(adapter)
        side = config.vision_config.spatial_merge_size
        in_patches = (grid[0], grid[1] * side, grid[2] * side)
        around = (getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end"))
        return BlankImage(
            math.prod(grid),
            (math.prod(in_patches), adapter.vision.module.patch_embed.proj.weight[0].numel()),
            math.prod(in_patches),
            size=("image_grid_thw", in_patches),
            around=tuple(word if token is None else token for token in around),
        )

    def inputs_of(self, adapter: ModelAdapter, images: Sequence[BlankImage], n_text: int) -> dict[str, Tensor]:
        """With the kind of every token; pixels are in single precision whatever the model is in."""
        found = blank_inputs(adapter, images, n_text, torch.float32)
        return {**found, "mm_token_type_ids": (found["input_ids"] == adapter.model.config.image_token_id).long()}

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """From ``grid_thw``."""
        return _merged(adapter, arguments.get("grid_thw"))

    def reading_order(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Tensor | None:
        """Windows, where there are such, come one behind the other."""
        tower: Any = adapter.vision.module
        if not hasattr(tower, "fullatt_block_indexes"):
            return None
        order, _ = get_vision_window_index(
            arguments["grid_thw"], tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        return order

    def coordinates(self, layouts: Iterable[Layout], position_ids: Tensor | None, visual: Tensor) -> Tensor:
        """M-RoPE's positions."""
        if position_ids is None or position_ids.shape[0] != 3:
            return super().coordinates(layouts, position_ids, visual)
        return position_ids[:, visual].long()


class TimedFramesFamily(GriddedFamily):
    """Frames of a video stand apart in the prompt, each behind a written time."""

    def modalities(self, model: Any) -> dict[str, Modality]:
        """Images and videos."""
        found = super().modalities(model)
        return {**found, "video": dataclasses.replace(found["video"], in_parts=True)}

    def coordinates(self, layouts: Iterable[Layout], position_ids: Tensor | None, visual: Tensor) -> Tensor:
        """By the grids; M-RoPE counts rows and columns of a frame from where it stands in the prompt."""
        layouts = tuple(layouts)
        fits = sum(map(n_tokens, layouts)) == visual.shape[0]
        if fits or position_ids is None or position_ids.shape[0] != 3:
            return grid_coordinates(layouts, visual)
        time, row, column = position_ids[:, visual]
        return torch.stack((time, row - time, column - time))


def packed_tower(vision: Vision) -> PackedTower:
    """The tower of a Qwen model as data."""
    tower: Any = vision.module
    full = [i for i, _ in vision.readable]
    side = tower.spatial_merge_size
    return PackedTower(
        projection=tower.patch_embed.proj,
        rotary=tower.rotary_pos_emb,
        blocks=tuple(_tower_block(block, i in full) for i, block in enumerate(tower.blocks)),
        merger=tower.merger,
        side=side,
        window=tower.window_size // side // tower.patch_size if hasattr(tower, "fullatt_block_indexes") else None,
    )


def _tower_block(block: Any, is_full: bool) -> TowerBlock:
    gated = {name: getattr(block.mlp, f"{name}_proj", None) for name in ("gate", "up", "down")}
    return TowerBlock(
        module=block,
        attention=block.attn,
        mlp=block.mlp,
        attention_norm=block.norm1,
        mlp_norm=block.norm2,
        qkv=block.attn.qkv,
        output=block.attn.proj,
        n_heads=block.attn.num_heads,
        scaling=block.attn.scaling,
        is_full=is_full,
        **gated,
    )


def _merged(adapter: ModelAdapter, grid_thw: Any) -> list[Grid] | None:
    if grid_thw is None:
        return None
    side = adapter.model.config.vision_config.spatial_merge_size
    return [(t, h // side, w // side) for t, h, w in grid_thw.tolist()]
