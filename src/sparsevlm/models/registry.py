"""The supported families, and the adapter of a model."""

from __future__ import annotations

from typing import Any

from .base import Family, ModelAdapter
from .gemma4 import Gemma4Family
from .generic import GenericFamily
from .idefics import IdeficsFamily
from .llava import LlavaFamily
from .minicpmv import MiniCPMVFamily
from .ovis2 import Ovis2Family
from .plain import PackedFamily, SizedFamily
from .qwen2_vl import Qwen2VLFamily
from .qwen3_5 import Qwen3_5Family
from .qwen3_vl import Qwen3VLFamily
from .qwen_omni import OmniFamily
from .refused import ENCODER_DECODER, REFUSED
from .tiled import TiledFamily
from .wrapping import check_module, wrapper_hint

_LAYER = ("vision_feature_layer",)
_TAKEN = (*_LAYER, "vision_feature_select_strategy")
_OF_TILES = (*_TAKEN, "image_sizes")
_CUT = "the tokens of a picture in tiles are not those of the tower: margins are cut off, and large pictures scaled"
FAMILIES: tuple[Family, ...] = (
    Qwen2VLFamily(),
    Qwen3VLFamily(),
    Qwen3_5Family(),
    OmniFamily(),
    LlavaFamily(
        ("llava",),
        ("LlavaForConditionalGeneration",),
        in_parts=True,
        encoder_inputs=_OF_TILES,
        captured="",
    ),
    LlavaFamily(
        ("llava_next",),
        ("LlavaNextForConditionalGeneration",),
        unreadable=_CUT,
        encoder_inputs=_OF_TILES,
        captured="",
    ),
    LlavaFamily(
        ("llava_onevision",),
        ("LlavaOnevisionForConditionalGeneration",),
        unreadable=_CUT,
        video_token="video_token_id",
        encoder_inputs=(*_OF_TILES, "vision_aspect_ratio", "batch_num_images"),
        captured="",
    ),
    TiledFamily(
        ("internvl",),
        ("InternVLForConditionalGeneration",),
        blocks="encoder.layer",
        attention="attention",
        merge="downsample_ratio",
        whole="last",
        encoder_inputs=_TAKEN,
        most_tiles=13,
        captured="",
    ),
    IdeficsFamily(
        ("idefics3", "smolvlm"),
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        text="model.text_model",
        tower="model.vision_model",
        projector="connector",
        merge="scale_factor",
        unreadable="patches that only fill a tile up would count as well",
        encoder_inputs=("pixel_attention_mask",),
        captured="encoder",
    ),
    TiledFamily(("gemma3",), ("Gemma3ForConditionalGeneration",), tile_tokens="mm_tokens_per_image", is_cut=False),
    Gemma4Family(
        ("gemma4",),
        ("Gemma4ForConditionalGeneration",),
        projector="embed_vision",
        merge="vision_config.pooling_kernel_size",
    ),
    Gemma4Family(
        ("gemma4_unified",),
        ("Gemma4UnifiedForConditionalGeneration",),
        tower="model.embed_vision",
        blocks="",
        unreadable="it has no blocks: pixels become tokens in one step",
    ),
    MiniCPMVFamily(("minicpmv4_6",), ("MiniCPMV4_6ForConditionalGeneration",), projector="merger"),
    TiledFamily(("paligemma",), ("PaliGemmaForConditionalGeneration",), is_cut=False, sees_whole_prompt=True),
    Ovis2Family(
        ("ovis2",),
        ("Ovis2ForConditionalGeneration",),
        attention="attention",
        projector="visual_embeddings_table",
        merge="vision_config.hidden_stride",
    ),
    TiledFamily(
        ("deepseek_vl",),
        ("DeepseekVLForConditionalGeneration",),
        tower="model.vision_model",
        projector="aligner",
        is_cut=False,
        encoder_inputs=(),
        captured="",
    ),
    SizedFamily(
        ("mistral3",),
        ("Mistral3ForConditionalGeneration",),
        blocks="transformer.layers",
        attention="attention",
        merge="spatial_merge_size",
        encoder_inputs=(*_LAYER, "image_sizes"),
        captured="",
    ),
    SizedFamily(
        ("lighton_ocr",),
        ("LightOnOcrForConditionalGeneration",),
        tower="model.vision_encoder",
        projector="vision_projection",
        blocks="transformer.layers",
        attention="attention",
        merge="spatial_merge_size",
        in_parts=False,
        encoder_inputs=("image_sizes",),
        captured="",
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
        in_parts=True,
    ),
    PackedFamily(
        ("paddleocr_vl",),
        ("PaddleOCRVLForConditionalGeneration",),
        tower="model.visual",
        projector="projector",
        by_rows=True,
        n_position_axes=3,
    ),
    PackedFamily(
        ("kimi_k25",),
        ("Kimi_K25ForConditionalGeneration",),
        projector="mm_projector",
        merge="vision_config.merge_kernel_size",
        video_token="video_token_id",
        pools_time=True,
        unreadable="it joins the frames of a video",
    ),
)


GENERIC = "generic"
_REGISTERED: dict[str, Family] = {}


def register_adapter(name: str, family: Family) -> None:
    """Let models of a class be pruned as a family describes them; the last registration of a class holds.

    Parameters
    ----------
    name : str
        Of the class, such as ``"MyVLForConditionalGeneration"``; classes derived from it are meant as well.
    family : Family
        An object, not a class.

    Raises
    ------
    TypeError
        If ``name`` is no name, or ``family`` no family.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(
            f"name must be the name of a model's class, such as 'MyVLForConditionalGeneration', got {name!r}."
        )
    if not isinstance(family, Family):
        raise TypeError(
            f"family must be an object of a subclass of sparsevlm.models.Family, got {family!r}. Of a class, pass an "
            "object of it."
        )
    _REGISTERED[name] = family


def supported_model_types() -> tuple[str, ...]:
    """``model_type`` of every checkpoint that is supported."""
    return tuple(name for family in (*FAMILIES, *_REGISTERED.values()) for name in family.model_types)


def adapter_for(model: Any, family: str | None = None) -> ModelAdapter:
    """Find the family of a model and look at it.

    Parameters
    ----------
    model : PreTrainedModel
    family : str, optional
        ``"generic"``: where no family has its class, find its parts by their usual names.

    Raises
    ------
    TypeError
        If ``model`` is no torch module.
    NotImplementedError
        If no family has its class, or one refuses it.
    ValueError
        If a checkpoint was loaded with the wrong class, or there is no such way to find a family.
    """
    check_module(model)
    if family not in (None, GENERIC):
        raise ValueError(
            f"family must be None or {GENERIC!r}, got {family!r}. For a family of your own call register_adapter."
        )
    families = {name: one for one in FAMILIES for name in one.class_names} | _REGISTERED
    names = [cls.__name__ for cls in type(model).__mro__]
    if (known := next((name for name in names if name in families), None)) is not None:
        return ModelAdapter.of(families[known], model)
    _check_refused(model, names)
    if family == GENERIC:
        return ModelAdapter.of(GenericFamily(), model)
    hint = wrapper_hint(model)
    if not hint and not any(
        hasattr(part, name)
        for name in ("visual", "vision_tower", "vision_model")
        for part in (model, getattr(model, "model", None))
    ):
        hint = " It has no vision tower that this library knows; a text-only model has no visual tokens to prune."
        if "PreTrainedModel" not in names:
            hint = " It is no model of transformers: pass one that takes images or videos, such as load_model returns."
    elif not hint:
        hint = " family='generic' tries any other that is built alike; register_adapter takes a description of it."
    raise NotImplementedError(f"{names[0]} is not supported. Supported are {', '.join(sorted(families))}.{hint}")


def _check_refused(model: Any, names: list[str]) -> None:
    why = next((REFUSED[name] for name in names if name in REFUSED), None)
    if why is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        why = ENCODER_DECODER
    if why is not None:
        raise NotImplementedError(f"a {names[0]} cannot be pruned: {why}.")
