"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from ..runtime.view import ModelView

# The vision configuration of Qwen2.5-VL has these, that of Qwen2-VL does not.
_ONLY_IN_2_5 = ("fullatt_block_indexes", "window_size")
_CLASS_OF_TYPE = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


def view(model: Any) -> ModelView:
    """Look at a Qwen2-VL or Qwen2.5-VL model.

    Raises
    ------
    ValueError
        If the checkpoint is of the other family than the class it was loaded with.
    NotImplementedError
        For sliding-window layers and tensor-parallel models.
    """
    _check_class(model)
    base_model = model.model
    text_model = base_model.language_model
    if "sliding_attention" in (getattr(text_model.config, "layer_types", None) or ()):
        raise NotImplementedError(
            "decoder layers with a sliding window are not supported: a pruned sequence would move what the window "
            "covers. Load the model with use_sliding_window=False in its text configuration."
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise NotImplementedError(
            "tensor-parallel models are not supported: each rank would choose other tokens. Load without tp_plan."
        )
    layers: Any = text_model.layers
    tower = base_model.visual
    named = getattr(tower, "fullatt_block_indexes", None)  # Qwen2-VL has none: every block has full attention
    full = tuple(i for i in range(len(tower.blocks)) if named is None or i in named)
    return ModelView(
        model=model,
        base_model=base_model,
        text_model=text_model,
        layers=layers,
        attentions=tuple(layer.self_attn for layer in layers),
        vision_tower=tower,
        vision_attentions=tuple(tower.blocks[i].attn for i in full),
        vision_block_indices=full,
        n_vision_blocks=len(tower.blocks),
        vision_windows=None if named is None else partial(_windows, tower),
        image_token_id=model.config.image_token_id,
        video_token_id=model.config.video_token_id,
        special_token_ids=_special_token_ids(model),
        spatial_merge_size=model.config.vision_config.spatial_merge_size,
    )


def _windows(tower: Any, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    return get_vision_window_index(grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)


def _special_token_ids(model: Any) -> frozenset[int]:
    found: set[int] = set()
    text_config = model.config.get_text_config()
    for config in (model.config, text_config, model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vision_start_token_id", "vision_end_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, (list, tuple)):
                found.update(value)
            elif value is not None:
                found.add(value)
    return frozenset(found)


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
