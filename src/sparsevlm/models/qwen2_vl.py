"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import dataclasses
from typing import Any

from .blocks import with_block
from .decoder import Decoder
from .gridded import GriddedFamily, packed_tower
from .tower import Vision

# The vision configuration of Qwen2.5-VL has these, that of Qwen2-VL does not.
_ONLY_IN_2_5 = ("fullatt_block_indexes", "window_size")
_CLASS_OF_TYPE = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}


class Qwen2VLFamily(GriddedFamily):
    """Qwen2 decoder, and a tower of which that of Qwen2.5-VL has windows."""

    model_types = tuple(_CLASS_OF_TYPE)
    class_names = tuple(_CLASS_OF_TYPE.values())

    def check(self, model: Any) -> None:
        """Refuse checkpoints of the other class as well."""
        _check_class(model)
        super().check(model)

    def decoder(self, model: Any) -> Decoder:
        """The decoder of a model."""
        return with_block(Decoder.of_llama(model.model.language_model, model.lm_head, n_position_axes=3))

    def vision(self, model: Any) -> Vision:
        """The vision tower of a model."""
        vision = super().vision(model)
        return dataclasses.replace(vision, program=packed_tower(vision))


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
