"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from .base import Decoder, DecoderBlock, Family, Modality, ModelAdapter, PackedTower, TowerBlock, Vision
from .layout import Grid, Layout

# The vision configuration of Qwen2.5-VL has these, that of Qwen2-VL does not.
_ONLY_IN_2_5 = ("fullatt_block_indexes", "window_size")
_CLASS_OF_TYPE = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


class Qwen2VLFamily(Family):
    """Qwen2 decoder with M-RoPE, and a tower over packed patches, of Qwen2.5-VL with windows."""

    model_types = tuple(_CLASS_OF_TYPE)
    class_names = tuple(_CLASS_OF_TYPE.values())

    def check(self, model: Any) -> None:
        """Refuse checkpoints of the other class as well."""
        _check_class(model)
        super().check(model)

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model."""
        return Decoder.of_llama(model.model.language_model, model.lm_head, n_position_axes=3, block=DecoderBlock())

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model."""
        tower = model.model.visual
        named = getattr(tower, "fullatt_block_indexes", None)  # Qwen2-VL has none: every block has full attention
        full = [i for i in range(len(tower.blocks)) if named is None or i in named]
        side = model.config.vision_config.spatial_merge_size
        program = PackedTower(
            projection=tower.patch_embed.proj,
            rotary=tower.rotary_pos_emb,
            blocks=tuple(_tower_block(block, i in full) for i, block in enumerate(tower.blocks)),
            merger=tower.merger,
            side=side,
            window=None if named is None else tower.window_size // side // tower.patch_size,
        )
        return Vision(
            module=tower,
            readable=tuple((i, tower.blocks[i].attn) for i in full),
            n_blocks=len(tower.blocks),
            patches_per_token=side**2,
            program=program,
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

    def example(self, adapter: ModelAdapter, grid: Grid, n_text: int) -> dict[str, Tensor]:
        """As the processor makes them."""
        config, device = adapter.model.config, adapter.model.device
        tokens = {modality.token_id for modality in adapter.modalities.values()} | adapter.special_token_ids
        word = next(i for i in range(len(tokens) + 1) if i not in tokens)
        n_visual, side = math.prod(grid), config.vision_config.spatial_merge_size
        ids = torch.full((1, n_visual + n_text), word, dtype=torch.int64, device=device)
        first = n_text // 4 + 1
        ids[:, first - 1], ids[:, first + n_visual] = config.vision_start_token_id, config.vision_end_token_id
        ids[:, first : first + n_visual] = config.image_token_id
        size = adapter.vision.module.patch_embed.proj.weight[0].numel()
        in_patches = [grid[0], grid[1] * side, grid[2] * side]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == config.image_token_id).long(),
            "pixel_values": torch.zeros((math.prod(in_patches), size), device=device),
            "image_grid_thw": torch.tensor([in_patches], device=device),
        }

    def tower_grids(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> list[Grid] | None:
        """From ``grid_thw``."""
        return _merged(adapter, arguments.get("grid_thw"))

    def reading_order(self, adapter: ModelAdapter, arguments: Mapping[str, Any]) -> Tensor | None:
        """Windows of Qwen2.5-VL come one behind the other."""
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
        return position_ids[:, visual]


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


def _check_class(model: Any) -> None:
    loaded_as = type(model).__name__
    written_for = next(iter(getattr(model.config, "architectures", None) or ()), None)
    if written_for == loaded_as or loaded_as not in _CLASS_OF_TYPE.values():
        return
    vision = model.config.vision_config
    traces_of_2_5 = any(name in vision.to_dict() for name in _ONLY_IN_2_5)
    is_2_5 = loaded_as == _CLASS_OF_TYPE["qwen2_5_vl"]
    if traces_of_2_5 == is_2_5 and written_for not in _CLASS_OF_TYPE.values():
        return
    right = written_for if written_for in _CLASS_OF_TYPE.values() else None
    right = right or _CLASS_OF_TYPE["qwen2_5_vl" if traces_of_2_5 else "qwen2_vl"]
    if right == loaded_as:
        return
    raise ValueError(
        f"this checkpoint is made for {right}, but was loaded as {loaded_as}: its weights do not fit that class and "
        f"the answers would be noise. Load it with transformers.{right}.from_pretrained(...)."
    )
