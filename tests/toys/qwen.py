"""Toys of Qwen2-VL to Qwen3.5, and of the thinkers of Qwen-Omni."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

from .kinds import (
    AROUND,
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    IS_OLD,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Kind,
)

QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_OMNI = {
    **QWEN,
    "audio_token_id": AUDIO,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
    "position_id_per_seconds": 2,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 36}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_HYBRID = ["linear_attention", "full_attention"]
_PARTIAL = {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}


def _qwen2_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **vision_options}
    text = {**text, "rope_parameters": MROPE}
    return Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN)


def _qwen2_5_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], **vision_options}
    text = {**text, "rope_parameters": MROPE}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN)


def _qwen3_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, "head_dim": 16, "rope_parameters": MROPE}
    return Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN)


def _qwen3_vl_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, **_EXPERTS, "head_dim": 16, "rope_parameters": MROPE, "mlp_only_layers": [4]}
    return Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig(text_config=text, vision_config=vision, **QWEN)


def _qwen2_5_omni(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], **vision_options}
    text = {**text, "rope_parameters": MROPE}
    parts = {"text_config": text, "vision_config": vision, "audio_config": _audio(64)}
    return Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniThinkerConfig(**parts, **_OMNI)


def _qwen3_omni_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, **_EXPERTS, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
    parts = {
        "text_config": text,
        "vision_config": vision,
        "audio_config": {**_audio(64), "n_window": 50, "downsample_hidden_size": 8},
    }
    return Qwen3OmniMoeThinkerForConditionalGeneration, Qwen3OmniMoeThinkerConfig(**parts, **_OMNI)


def _audio(width: int) -> dict[str, Any]:
    return {
        "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32,
        "n_window": 4, "output_dim": width,
    }  # fmt: skip


def _qwen3_5_parts(text: dict[str, Any], vision_options: dict[str, Any]) -> dict[str, Any]:
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 36, **vision_options}
    types = (_HYBRID * text["num_hidden_layers"])[: text["num_hidden_layers"]]
    text = {**text, **_DELTA, "head_dim": 16, "rope_parameters": _PARTIAL, "layer_types": types}
    return {"text_config": text, "vision_config": vision}


def _qwen3_5(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    return Qwen3_5ForConditionalGeneration, Qwen3_5Config(**_qwen3_5_parts(text, vision_options), **QWEN)


def _qwen3_5_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    text = {**text, **_EXPERTS, "shared_expert_intermediate_size": 48}
    return Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig(**_qwen3_5_parts(text, vision_options), **QWEN)


def _minicpmv(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    parts = _qwen3_5_parts(text, {})
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"image_size": 8 * 4, "patch_size": 4, **vision_options}
    text = {**parts["text_config"], "model_type": "qwen3_5_text"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    parts = {"text_config": text, "vision_config": vision, "insert_layer_id": 1}
    return MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Config(
        **parts, image_token_id=IMAGE, video_token_id=VIDEO, downsample_mode="16x"
    )


def _patches(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3 * 2 * PATCH * PATCH, generator=generator)


def qwen_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": _patches(4 * h * w, generator), "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}


def qwen_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    pixels, grid = _patches(t * 4 * h * w, generator), torch.tensor([[t, 2 * h, 2 * w]])
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def _slices(name: str, sizes: str) -> Callable[..., dict[str, Tensor]]:
    """Slices, or frames, of one size: patches of four pixels a side in one long row."""

    def draw(generator: torch.Generator, *size: int) -> dict[str, Tensor]:
        *n_slices, h, w = size
        count = n_slices[0] if n_slices else 1
        pixels = torch.randn(1, 3, 4, count * 16 * h * w * 4, generator=generator)
        return {name: pixels, sizes: torch.tensor([[4 * h, 4 * w]] * count)}

    return draw


def _timed_qwen_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {**qwen_video(generator, t, h, w), "second_per_grid_ts": torch.ones(1)}


def _omni_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {**qwen_video(generator, t, h, w), "video_second_per_grid": torch.ones(1)}


def _qwen_kinds(video: Callable[..., dict[str, Tensor]]) -> dict[str, Kind]:
    return {"image": Kind(IMAGE, qwen_image, *AROUND, 1), "video": Kind(VIDEO, video, *AROUND, 2)}


_TIMED_FRAMES = {
    "image": Kind(IMAGE, qwen_image, *AROUND, 1),
    "video": Kind(VIDEO, qwen_video, *AROUND, 2, time=(81, 82)),
}
_OMNI_KINDS = {"image": Kind(IMAGE, qwen_image, *AROUND), "video": Kind(VIDEO, _omni_video, *AROUND)}
OF_QWEN = {"n_position_axes": 3, "remembered": ("model.rope_deltas",)}
# Older transformers have the parts of a thinker on the thinker itself.
_FLAT = {"decoder": "model", "tower": "visual", "remembered": ("rope_deltas",)}
_OF_OMNI = {**OF_QWEN, "positions_need_mask": True}
_OF_OMNI |= {} if hasattr(modeling_qwen2_5_omni, "Qwen2_5OmniThinkerModel") else _FLAT
_OF_OMNI |= {"repeats": "patches"} if IS_OLD else {}
QWEN_FAMILIES = {
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen_kinds(_timed_qwen_video), **OF_QWEN, tower_on_engine=True),
    "qwen2_vl": Family(_qwen2_vl, _qwen_kinds(qwen_video), **OF_QWEN, tower_on_engine=True),
    "qwen3_vl": Family(_qwen3_vl, _TIMED_FRAMES, **OF_QWEN, tower_on_engine=True),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _TIMED_FRAMES, **OF_QWEN, on_engine=False),
    "qwen3_5": Family(_qwen3_5, _TIMED_FRAMES, **OF_QWEN, on_engine=False, is_hybrid=True),
    "qwen3_5_moe": Family(_qwen3_5_moe, _TIMED_FRAMES, **OF_QWEN, on_engine=False, is_hybrid=True),
    "minicpmv4_6": Family(
        _minicpmv,
        {
            # Older transformers encode slices of one size only.
            "image": Kind(IMAGE, _slices("pixel_values", "target_sizes"), *AROUND, size=(4, 4) if IS_OLD else None),
            "video": Kind(VIDEO, _slices("pixel_values_videos", "target_sizes_videos"), *AROUND, time=(80,)),
        },
        tower="model.vision_tower",
        on_engine=False,
        is_hybrid=True,
        packed=True,
        repeats="packs" if IS_OLD else "samples",
    ),
    "qwen2_5_omni_thinker": Family(_qwen2_5_omni, _OMNI_KINDS, **_OF_OMNI, on_engine=False),
    "qwen3_omni_moe_thinker": Family(_qwen3_omni_moe, _OMNI_KINDS, **_OF_OMNI, on_engine=False),
}
