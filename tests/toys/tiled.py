"""Toys of families whose tower takes images, or tiles of them, of one size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from .kinds import AROUND, AS_IMAGES, IMAGE, INDICATORS, IS_OLD, PATCH, VIDEO, VISION_END, VISION_START, Family, Kind

# Towers of 3 x 3 patches; pictures of 4 x 6 patches in four tiles, of whose margins two rows are cut off.
_TILE, _PINPOINTS = 3 * PATCH, [[3 * PATCH, 6 * PATCH], [6 * PATCH, 3 * PATCH], [6 * PATCH, 6 * PATCH]]
_SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
_SMALL_TOWER |= {"image_size": _TILE, "patch_size": PATCH}


def _llava(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 4 * PATCH, "patch_size": PATCH, "projection_dim": 32, **vision_options}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=IMAGE
    )
    return LlavaForConditionalGeneration, config


def _llava_next(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = CLIPVisionConfig(**_SMALL_TOWER, projection_dim=32, **vision_options)
    config = LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE, image_grid_pinpoints=_PINPOINTS
    )
    return LlavaNextForConditionalGeneration, config


def _llava_onevision(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = SiglipVisionConfig(**_SMALL_TOWER, vision_use_head=False, **vision_options)
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE, video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration, config


def _internvl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    """As in InternVL 3.5; 3 has Qwen2 for a text model."""
    vision = {**_SMALL_TOWER, "image_size": [4 * PATCH] * 2, "patch_size": [PATCH] * 2, **vision_options}
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen3Config(**text, head_dim=16), image_token_id=IMAGE, image_seq_length=4
    )
    return InternVLForConditionalGeneration, config


def _smolvlm(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_SMALL_TOWER, "image_size": 4 * PATCH, **vision_options}
    config = SmolVLMConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE)
    return SmolVLMForConditionalGeneration, config


def _idefics3(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_SMALL_TOWER, "image_size": 4 * PATCH, **vision_options}
    config = Idefics3Config(vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE)
    return Idefics3ForConditionalGeneration, config


def _paligemma(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = SiglipVisionConfig(**{**_SMALL_TOWER, **vision_options}, projection_dim=64, vision_use_head=False)
    is_second = "attn_logit_softcapping" in text
    text = (Gemma2Config if is_second else GemmaConfig)(**text, head_dim=16)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=64, hidden_size=64, vocab_size=96
    )
    return PaliGemmaForConditionalGeneration, config


def _paligemma2(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    """With a cap that bites, and a window."""
    capped = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 16, "sliding_window": 12, **text}
    return _paligemma(capped, vision_options)


def _ovis2(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_SMALL_TOWER, "image_size": 4 * PATCH, "hidden_stride": 2, "vocab_size": 40, **vision_options}
    config = Ovis2Config(
        vision_config=vision, text_config=Qwen2Config(**text), image_token_id=IMAGE, vocab_size=96, hidden_size=64,
        visual_indicator_token_ids=list(INDICATORS),
    )  # fmt: skip
    return Ovis2ForConditionalGeneration, config


def _deepseek_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = SiglipVisionConfig(**{**_SMALL_TOWER, **vision_options}, vision_use_head=False)
    config = DeepseekVLConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE)
    return DeepseekVLForConditionalGeneration, config


_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def _gemma3(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    types = (_MIXED * text["num_hidden_layers"])[: text["num_hidden_layers"]]
    vision = {**_SMALL_TOWER, "image_size": 8 * PATCH, "vision_use_head": False, "model_type": "siglip_vision_model"}
    text = {**text, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "layer_types": types}
    parts = {"text_config": text, "vision_config": {**vision, **vision_options}, "mm_tokens_per_image": 16}
    tokens = {"image_token_index": IMAGE, "boi_token_index": VISION_START, "eoi_token_index": VISION_END}
    return Gemma3ForConditionalGeneration, Gemma3Config(**parts, **tokens)


def _small_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, h * PATCH, w * PATCH, generator=generator)}


def _tiles(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(1, 5, 3, _TILE, _TILE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[h * PATCH, w * PATCH]])}


def _frames(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(1, t, 3, _TILE, _TILE, generator=generator)}


def _three_tiles(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(t, 3, 2 * h * PATCH, 2 * w * PATCH, generator=generator)}


def _apart(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, t, 3, 2 * h * PATCH, 2 * w * PATCH, generator=generator)}


def _gemma3_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, 8 * PATCH, 8 * PATCH, generator=generator)}


_IN_TILES = Kind(IMAGE, _tiles, size=(4, 6), tokens=lambda h, w: [IMAGE] * (9 + h * (w + 1)))
_IN_FRAMES = Kind(VIDEO, _frames, size=(3, 2, 2), tokens=lambda t, h, w: [VIDEO] * (t * h * w + 1))
_TILES_APART = Kind(IMAGE, _apart, size=(3, 2, 2), tokens=lambda t, h, w: [80, *[IMAGE] * h * w] * t + [80])
_TOWER = {"tower": "model.vision_tower", **AS_IMAGES}
_OF_IDEFICS = {"decoder": "model.text_model", "tower": "model.vision_model", **AS_IMAGES}
_BOTH_WAYS = {"type_input": "token_type_ids", "attentions": ("sdpa", "eager")}  # images, or prompts, see all of theirs
_OF_PALIGEMMA: dict[str, Any] = {
    **_TOWER, "kinds": {"image": Kind(IMAGE, _small_image, token_type=0, size=(3, 3))}, "prefix": True,
    "second_images": False, "on_engine": False,
}  # fmt: skip
TILED_FAMILIES = {
    "llava": Family(_llava, {"image": Kind(IMAGE, _small_image, size=(4, 4))}, **_TOWER),
    "llava_next": Family(_llava_next, {"image": _IN_TILES}, **_TOWER),
    "llava_onevision": Family(
        _llava_onevision, {"image": _IN_TILES, "video": _IN_FRAMES}, **_TOWER, only_on_hooks=("video",) * IS_OLD
    ),
    "internvl": Family(_internvl, {"image": Kind(IMAGE, _three_tiles, *AROUND, size=(3, 2, 2))}, **_TOWER),
    "smolvlm": Family(_smolvlm, {"image": _TILES_APART}, **_OF_IDEFICS),
    "idefics3": Family(_idefics3, {"image": _TILES_APART}, **_OF_IDEFICS),
    "paligemma": Family(_paligemma, **_OF_PALIGEMMA, **_BOTH_WAYS, caches=("dynamic", "static")),
    # Under sdpa transformers leaves the cap out, or refuses.
    "paligemma2": Family(
        _paligemma2, **_OF_PALIGEMMA, **{**_BOTH_WAYS, "attentions": ("eager",)}, caches=("dynamic",)
    ),
    "gemma3": Family(
        _gemma3, {"image": Kind(IMAGE, _gemma3_image, *AROUND, 1, size=(4, 4))}, **_TOWER, **_BOTH_WAYS,
        caches=("dynamic", "none"), second_images=not IS_OLD, on_engine=False,
    ),
    "ovis2": Family(
        _ovis2, {"image": Kind(IMAGE, _three_tiles, (81,), (82,), size=(3, 2, 2))}, **_TOWER, on_engine=False
    ),
    "deepseek_vl": Family(
        _deepseek_vl, {"image": Kind(IMAGE, _small_image, size=(3, 3))}, tower="model.vision_model", **AS_IMAGES
    ),
}  # fmt: skip
