"""The supported families, and the adapter of a model."""

from __future__ import annotations

from typing import Any

from .base import Family, ModelAdapter
from .llava import LlavaFamily
from .plain import PackedFamily, SizedFamily, TiledFamily
from .qwen2_vl import Qwen2VLFamily
from .wrapping import check_module, wrapper_hint

_CUT = "the tokens of a picture in tiles are not those of the tower: margins are cut off, and large pictures scaled"
FAMILIES: tuple[Family, ...] = (
    Qwen2VLFamily(),
    LlavaFamily(("llava",), ("LlavaForConditionalGeneration",)),
    LlavaFamily(("llava_next",), ("LlavaNextForConditionalGeneration",), unreadable=_CUT),
    LlavaFamily(
        ("llava_onevision",), ("LlavaOnevisionForConditionalGeneration",), unreadable=_CUT, video_token="video_token_id"
    ),
    TiledFamily(
        ("internvl",),
        ("InternVLForConditionalGeneration",),
        blocks="encoder.layer",
        attention="attention",
        merge="downsample_ratio",
    ),
    TiledFamily(
        ("idefics3", "smolvlm"),
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        text="model.text_model",
        tower="model.vision_model",
        merge="scale_factor",
        unreadable="patches that only fill a tile up would count as well",
    ),
    TiledFamily(("paligemma",), ("PaliGemmaForConditionalGeneration",)),
    TiledFamily(
        ("ovis2",), ("Ovis2ForConditionalGeneration",), attention="attention", merge="vision_config.hidden_stride"
    ),
    TiledFamily(("deepseek_vl",), ("DeepseekVLForConditionalGeneration",), tower="model.vision_model"),
    SizedFamily(
        ("mistral3",),
        ("Mistral3ForConditionalGeneration",),
        blocks="transformer.layers",
        attention="attention",
        merge="spatial_merge_size",
    ),
    PackedFamily(  # frames of a video have the image's placeholder
        ("glm4v", "glm46v", "glm4v_moe", "glm_ocr"),
        (
            "Glm4vForConditionalGeneration",
            "Glm46VForConditionalGeneration",
            "Glm4vMoeForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
        ),
        tower="model.visual",
        blocks="blocks",
        attention="attn",
        n_position_axes=3,
        video_token="image_token_id",
    ),
    PackedFamily(
        ("paddleocr_vl",),
        ("PaddleOCRVLForConditionalGeneration",),
        tower="model.visual",
        by_rows=True,
        n_position_axes=3,
    ),
    PackedFamily(
        ("kimi_k25",),
        ("Kimi_K25ForConditionalGeneration",),
        merge="vision_config.merge_kernel_size",
        video_token="video_token_id",
        pools_time=True,
        unreadable="it joins the frames of a video",
    ),
)


def supported_model_types() -> tuple[str, ...]:
    """``model_type`` of every checkpoint that is supported."""
    return tuple(name for family in FAMILIES for name in family.model_types)


def adapter_for(model: Any) -> ModelAdapter:
    """Find the family of a model and look at it.

    Parameters
    ----------
    model : PreTrainedModel

    Raises
    ------
    TypeError
        If ``model`` is no torch module.
    NotImplementedError
        If no family has its class, or one refuses it.
    ValueError
        If a checkpoint was loaded with the wrong class.
    """
    check_module(model)
    families = {name: family for family in FAMILIES for name in family.class_names}
    for cls in type(model).__mro__:
        if cls.__name__ in families:
            return ModelAdapter.of(families[cls.__name__], model)
    name = type(model).__name__
    hint = wrapper_hint(model)
    if not hint and not any(
        hasattr(part, "visual") or hasattr(part, "vision_tower") for part in (model, getattr(model, "model", None))
    ):
        hint = " It has no vision tower that this library knows; a text-only model has no visual tokens to prune."
    raise NotImplementedError(f"{name} is not supported. Supported are {', '.join(sorted(families))}.{hint}")
