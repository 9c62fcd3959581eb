"""Toys of families beside Qwen's whose images have any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PixtralVisionConfig,
    Qwen3Config,
)

from .kinds import AROUND, AS_IMAGES, AS_PATCHES, IMAGE, IS_OLD, PATCH, VIDEO, VISION_END, VISION_START, Family, Kind
from .qwen import MROPE, OF_QWEN, QWEN, QWEN_VISION, qwen_image, qwen_video

_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
_GLM = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": 87,
    "video_end_token_id": 88,
}


def _glm(config: type, cls: type, **more: Any) -> Callable[..., tuple[type, Any]]:
    def make(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
        vision = {**QWEN_VISION, "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        text = {**text, "rope_parameters": rope, "head_dim": 16, **more}
        return cls, config(text_config=text, vision_config={**vision, **vision_options}, **_GLM)

    return make


def _mistral3(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = PixtralVisionConfig(**{**_TOWER, "image_size": 16 * PATCH, "patch_size": PATCH, **vision_options})
    text = MistralConfig(**{"sliding_window": None, "head_dim": 16, **text})
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return Mistral3ForConditionalGeneration, config


def _lighton_ocr(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = PixtralVisionConfig(**{**_TOWER, "image_size": 16 * PATCH, "patch_size": PATCH, **vision_options})
    text = Qwen3Config(**{"head_dim": 16, **text})
    config = LightOnOcrConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return LightOnOcrForConditionalGeneration, config


def _paddleocr_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_TOWER, "image_size": 8 * PATCH, "patch_size": PATCH, "num_channels": 3, **vision_options}
    text = {**text, "rope_parameters": MROPE, "head_dim": 16}
    config = PaddleOCRVLConfig(text_config=text, vision_config=vision, **QWEN)
    return PaddleOCRVLForConditionalGeneration, config


def _kimi_k25(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_TOWER, "num_hidden_layers": 2, "pos_emb_height": 8, "pos_emb_width": 8, **vision_options}
    text = {**text, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    text |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    text |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1}
    config = Kimi_K25Config(
        text_config=DeepseekV3Config(**text), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        projection_hidden_size=32,
    )  # fmt: skip
    return Kimi_K25ForConditionalGeneration, config


_GEMMA = {"image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": VISION_START, "eoi_token_id": VISION_END}
_GEMMA |= {"audio_config": None, "audio_token_id": None}


def _gemma4_text(text: dict[str, Any], n_shared: int, **more: Any) -> dict[str, Any]:
    """Sliding layers between full ones with larger heads; layers that share keys come on top."""
    types = (["sliding_attention", "full_attention", *["sliding_attention"] * 2] * 4)[: text["num_hidden_layers"] - 1]
    types = [*types, "full_attention", *["sliding_attention", "full_attention"] * (n_shared // 2)]
    return {
        "head_dim": 16, "global_head_dim": 32, "sliding_window": 12, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96, **text, **more,
        "num_hidden_layers": len(types), "layer_types": types, "num_kv_shared_layers": n_shared,
    }  # fmt: skip


def _gemma4(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    """As E2B; larger ones have no layers that share keys, and images that see all of themselves."""
    text = {"hidden_size_per_layer_input": 8, **text}
    text = _gemma4_text(text, text.pop("num_kv_shared_layers", 2))
    vision = {**_TOWER, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    vision |= {"position_embedding_size": 32, **vision_options}
    return Gemma4ForConditionalGeneration, Gemma4Config(text_config=text, vision_config=vision, **_GEMMA)


def _gemma4_unified(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 32}
    vision |= {"output_proj_dims": 32, **vision_options}
    text = _gemma4_text(text, 0, use_bidirectional_attention="vision")
    return Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedConfig(text_config=text, vision_config=vision, **_GEMMA)


def _placed(side: int, size: int) -> dict[str, Kind]:
    """Images of which each patch, ``side`` of them to a visual token each way, has its place."""
    n_most = 30 * side**2

    def patches(generator: torch.Generator, t: int, h: int, w: int) -> tuple[Tensor, Tensor]:
        x, y = torch.meshgrid(torch.arange(w * side), torch.arange(h * side), indexing="xy")
        places = torch.stack([x, y], dim=-1).flatten(0, 1)
        more = n_most - len(places)
        pixels = torch.rand(t, len(places), size, generator=generator)
        places = torch.nn.functional.pad(places, (0, 0, 0, more), value=-1).expand(t, -1, -1)
        return torch.nn.functional.pad(pixels, (0, 0, 0, more)), places

    def image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
        return dict(zip(("pixel_values", "image_position_ids"), patches(generator, 1, h, w), strict=True))

    def video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
        pixels, places = patches(generator, t, h, w)
        if IS_OLD:
            return {"pixel_values_videos": pixels[None], "video_position_ids": places[None]}
        count = {"num_frames_per_video": torch.tensor([t])}
        return {"pixel_values_videos": pixels, "video_position_ids": places, **count}

    return {"image": Kind(IMAGE, image, *AROUND, 1), "video": Kind(VIDEO, video, *AROUND, 2, time=(80,))}


def _sized_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    """Filled up to one size, as the processor does."""
    pixels = torch.randn(1, 3, 12 * PATCH, 12 * PATCH, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[2 * h * PATCH, 2 * w * PATCH]])}


def _single_patches(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(4 * h * w, 3, PATCH, PATCH, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}


def _single_frames(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(t * 4 * h * w, 3, PATCH, PATCH, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])}


# Frames stand apart, each behind a written time, under the placeholder of images.
_GLM_FRAMES = {"tokens": lambda t, h, w: [VISION_START, *[IMAGE] * h * w, VISION_END, 80] * t}
_GLM_KINDS = {
    "image": Kind(IMAGE, qwen_image, *AROUND, 1),
    "video": Kind(IMAGE, qwen_video, (87,), (88,), 2, **_GLM_FRAMES),
}
_ENDED_ROWS = Kind(IMAGE, _sized_image, (), (81,), tokens=lambda h, w: ([*[IMAGE] * w, 80] * h)[:-1])
_GLM_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
_IN_PATCHES = Kind(IMAGE, _single_patches, *AROUND)
_JOINED_FRAMES = Kind(VIDEO, _single_frames, *AROUND, tokens=lambda t, h, w: [VIDEO] * h * w)
_OF_GEMMA4: dict[str, Any] = {**AS_IMAGES, "on_engine": False, "attentions": ("sdpa", "eager")}
_OF_GEMMA4 |= {"caches": ("dynamic", "none"), "sharpness": 0.6}  # scores are not divided by the size of heads
SIZED_FAMILIES = {
    "mistral3": Family(_mistral3, {"image": _ENDED_ROWS}, tower="model.vision_tower", **AS_IMAGES),
    "lighton_ocr": Family(
        _lighton_ocr, {"image": Kind(IMAGE, _sized_image, *AROUND)}, tower="model.vision_encoder", **AS_IMAGES
    ),
    "glm4v": Family(_glm(Glm4vConfig, Glm4vForConditionalGeneration), _GLM_KINDS, on_engine=False, **OF_QWEN),
    "glm46v": Family(_glm(Glm46VConfig, Glm46VForConditionalGeneration), _GLM_KINDS, on_engine=False, **OF_QWEN),
    "glm4v_moe": Family(
        _glm(Glm4vMoeConfig, Glm4vMoeForConditionalGeneration, **_GLM_EXPERTS), _GLM_KINDS, on_engine=False, **OF_QWEN
    ),
    "glm_ocr": Family(_glm(GlmOcrConfig, GlmOcrForConditionalGeneration), _GLM_KINDS, on_engine=False, **OF_QWEN),
    "paddleocr_vl": Family(
        _paddleocr_vl, {"image": Kind(IMAGE, _single_patches, *AROUND, 1)}, on_engine=False, **OF_QWEN
    ),
    "gemma4": Family(_gemma4, _placed(2, 48), tower="model.vision_tower", **_OF_GEMMA4),
    "gemma4_unified": Family(_gemma4_unified, _placed(1, 192), tower="model.embed_vision", **_OF_GEMMA4),
    "kimi_k25": Family(
        _kimi_k25,
        {"image": _IN_PATCHES, "video": _JOINED_FRAMES},
        tower="model.vision_tower",
        on_engine=False,
        **AS_PATCHES,
    ),
}
