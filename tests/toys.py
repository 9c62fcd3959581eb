"""Tiny random models and inputs, made in code; what the tests have to know of a model family is a row of FAMILIES."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    GemmaConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 90, 91, 92, 93, 94, 95
INDICATORS = (81, 82, 83, 84, 85)  # of Ovis2, around images
AUDIO, AUDIO_START, AUDIO_END = 87, 88, 89
PATCH = 14
N_LAYERS = 6


@dataclass(frozen=True)
class Kind:
    """One kind of visual input of a family.

    Attributes
    ----------
    token : int
        Placeholder of one visual token.
    inputs : callable
        ``inputs(generator, *size)`` draws the model's inputs for one image or video; those of several are concatenated.
    before, after : tuple of int
        Tokens around the placeholders.
    token_type : int, optional
        Its value in ``mm_token_type_ids``; ``None``: the family has no such input.
    size : tuple of int, optional
        Visual tokens of every input by height and width, whatever a prompt asks for; ``None``: as it asks.
    time : tuple of int
        Text before each frame, of which every one stands alone then; empty: one behind the other.
    tokens : callable, optional
        ``tokens(*size)`` lists the ids between ``before`` and ``after``, where they are not as many placeholders as
        the size says.
    """

    token: int
    inputs: Callable[..., dict[str, Tensor]]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    token_type: int | None = None
    size: tuple[int, ...] | None = None
    time: tuple[int, ...] = ()

    tokens: Callable[..., list[int]] | None = None

    def size_of(self, asked: Sequence[int]) -> Sequence[int]:
        return asked if self.size is None else self.size

    def ids(self, size: Sequence[int]) -> list[int]:
        """Tokens of an image or video in the prompt."""
        if self.tokens is not None:
            return [*self.before, *self.tokens(*size), *self.after]
        n_parts, n_tokens = (size[0], math.prod(size[1:])) if self.time else (1, math.prod(size))
        return [*self.time, *self.before, *[self.token] * n_tokens, *self.after] * n_parts


@dataclass(frozen=True)
class Family:
    """One model family; its key in :data:`FAMILIES` is the ``model_type`` of its configuration.

    Attributes
    ----------
    make : callable
        ``make(text, vision_options)`` gives the class and the configuration of a tiny model with this text model.
    kinds : mapping of str to Kind
        By ``"image"``, ``"video"``.
    decoder, tower : str
        Where the text model, which holds ``layers``, and the vision tower are.
    n_position_axes : int
        Coordinates of one token.
    remembered : tuple of str
        Attributes in which positions outlast a call.
    on_engine : bool
        Whether the engine runs it.
    prefix : bool
        Whether all of a prompt sees all of it; ``token_type_ids`` say what is prompt.
    positions_need_mask : bool
        Whether positions are plain ones without an attention mask, which ``generate`` makes and other calls do not.
    repeats : str
        What ``generate`` repeats for beams and returned sequences, one behind the other: visual inputs of whole
        "samples", as it should, or, in older transformers, single "images" or "patches".
    """

    make: Callable[[dict[str, Any], dict[str, Any]], tuple[type, Any]]
    kinds: Mapping[str, Kind]
    decoder: str = "model.language_model"
    tower: str = "model.visual"
    n_position_axes: int = 1
    remembered: tuple[str, ...] = ()
    on_engine: bool = True
    prefix: bool = False
    positions_need_mask: bool = False
    repeats: str = "samples"

    def decoder_of(self, model) -> nn.Module:
        return operator.attrgetter(self.decoder)(model)

    def tower_of(self, model) -> nn.Module:
        return operator.attrgetter(self.tower)(model)

    def takes(self, rows) -> bool:
        """Whether the rows of a prompt hold only what the family knows."""
        return all(kind == "text" or kind in self.kinds for row in rows for kind, *_ in row)


_AROUND = ((VISION_START,), (VISION_END,))


def _patches(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3 * 2 * PATCH * PATCH, generator=generator)


def _qwen_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": _patches(4 * h * w, generator), "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}


def _qwen_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    pixels, grid = _patches(t * 4 * h * w, generator), torch.tensor([[t, 2 * h, 2 * w]])
    return {"pixel_values_videos": pixels, "video_grid_thw": grid}


def _timed_qwen_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {**_qwen_video(generator, t, h, w), "second_per_grid_ts": torch.ones(1)}


_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_OMNI = {
    **_QWEN,
    "audio_token_id": AUDIO,
    "audio_start_token_id": AUDIO_START,
    "audio_end_token_id": AUDIO_END,
    "position_id_per_seconds": 2,
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 36}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def _qwen2_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, **vision_options}
    text = {**text, "rope_parameters": _MROPE}
    return Qwen2VLForConditionalGeneration, Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen2_5_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], **vision_options}
    text = {**text, "rope_parameters": _MROPE}
    return Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen3_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, "head_dim": 16, "rope_parameters": _MROPE}
    return Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen3_vl_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, **_EXPERTS, "head_dim": 16, "rope_parameters": _MROPE, "mlp_only_layers": [4]}
    return Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_QWEN)


def _qwen2_5_omni(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
    vision |= {"fullatt_block_indexes": [1], **vision_options}
    text = {**text, "rope_parameters": _MROPE}
    parts = {"text_config": text, "vision_config": vision, "audio_config": _audio(64)}
    return Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniThinkerConfig(**parts, **_OMNI)


def _qwen3_omni_moe(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_QWEN_VISION, "depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {**_DEEPSTACK, **vision_options}
    text = {**text, **_EXPERTS, "head_dim": 16, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}
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


def _qwen_kinds(video: Callable[..., dict[str, Tensor]]) -> dict[str, Kind]:
    return {"image": Kind(IMAGE, _qwen_image, *_AROUND, 1), "video": Kind(VIDEO, video, *_AROUND, 2)}


def _omni_video(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {**_qwen_video(generator, t, h, w), "video_second_per_grid": torch.ones(1)}


def _llava(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    vision |= {"image_size": 4 * PATCH, "patch_size": PATCH, "projection_dim": 32, **vision_options}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=IMAGE
    )
    return LlavaForConditionalGeneration, config


def _llava_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, h * PATCH, w * PATCH, generator=generator)}


# Towers of 3 x 3 patches; pictures of 4 x 6 patches in four tiles, of whose margins two rows are cut off.
_TILE, _PINPOINTS = 3 * PATCH, [[3 * PATCH, 6 * PATCH], [6 * PATCH, 3 * PATCH], [6 * PATCH, 6 * PATCH]]
_SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
_SMALL_TOWER |= {"image_size": _TILE, "patch_size": PATCH}


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


def _tiles(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(1, 5, 3, _TILE, _TILE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[h * PATCH, w * PATCH]])}


def _frames(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": torch.randn(1, t, 3, _TILE, _TILE, generator=generator)}


_IN_TILES = Kind(IMAGE, _tiles, size=(4, 6), tokens=lambda h, w: [IMAGE] * (9 + h * (w + 1)))
_IN_FRAMES = Kind(VIDEO, _frames, size=(3, 2, 2), tokens=lambda t, h, w: [VIDEO] * (t * h * w + 1))


def _internvl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    """As in InternVL 3.5; 3 has Qwen2 for a text model."""
    vision = {**_SMALL_TOWER, "image_size": [4 * PATCH] * 2, "patch_size": [PATCH] * 2, **vision_options}
    config = InternVLConfig(
        vision_config=vision, text_config=Qwen3Config(**text, head_dim=16), image_token_id=IMAGE, image_seq_length=4
    )
    return InternVLForConditionalGeneration, config


def _three_tiles(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(t, 3, 2 * h * PATCH, 2 * w * PATCH, generator=generator)}


def _smolvlm(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_SMALL_TOWER, "image_size": 4 * PATCH, **vision_options}
    config = SmolVLMConfig(vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE)
    return SmolVLMForConditionalGeneration, config


def _idefics3(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_SMALL_TOWER, "image_size": 4 * PATCH, **vision_options}
    config = Idefics3Config(vision_config=vision, text_config=LlamaConfig(**text), image_token_id=IMAGE)
    return Idefics3ForConditionalGeneration, config


def _apart(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, t, 3, 2 * h * PATCH, 2 * w * PATCH, generator=generator)}


_TILES_APART = Kind(IMAGE, _apart, size=(3, 2, 2), tokens=lambda t, h, w: [80, *[IMAGE] * h * w] * t + [80])


def _paligemma(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = SiglipVisionConfig(**{**_SMALL_TOWER, **vision_options}, projection_dim=64, vision_use_head=False)
    text = GemmaConfig(**text, head_dim=16)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projection_dim=64, hidden_size=64, vocab_size=96
    )
    return PaliGemmaForConditionalGeneration, config


def _small_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, h * PATCH, w * PATCH, generator=generator)}


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


def _mistral3(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = PixtralVisionConfig(**{**_SMALL_TOWER, "image_size": 16 * PATCH, **vision_options})
    text = MistralConfig(**text, sliding_window=None, head_dim=16)
    config = Mistral3Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return Mistral3ForConditionalGeneration, config


def _sized_image(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    """Filled up to one size, as the processor does."""
    pixels = torch.randn(1, 3, 12 * PATCH, 12 * PATCH, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[2 * h * PATCH, 2 * w * PATCH]])}


_ENDED_ROWS = Kind(IMAGE, _sized_image, (), (81,), tokens=lambda h, w: ([*[IMAGE] * w, 80] * h)[:-1])


_GLM = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": 87,
    "video_end_token_id": 88,
}


def _glm(config: type, cls: type, more: dict[str, Any]) -> Callable[..., tuple[type, Any]]:
    def make(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
        vision = {**_QWEN_VISION, "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        text = {**text, "rope_parameters": rope, "head_dim": 16, **more}
        return cls, config(text_config=text, vision_config={**vision, **vision_options}, **_GLM)

    return make


# Frames stand apart, each behind a written time, under the placeholder of images.
_GLM_KINDS = {
    "image": Kind(IMAGE, _qwen_image, (VISION_START,), (VISION_END,), 1),
    "video": Kind(
        IMAGE,
        _qwen_video,
        (87,),
        (88,),
        2,
        tokens=lambda t, h, w: [VISION_START, *[IMAGE] * h * w, VISION_END, 80] * t,
    ),
}


def _paddleocr_vl(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {**_SMALL_TOWER, "image_size": 8 * PATCH, "num_channels": 3, **vision_options}
    text = {**text, "rope_parameters": _MROPE, "head_dim": 16}
    config = PaddleOCRVLConfig(text_config=text, vision_config=vision, **_QWEN)
    return PaddleOCRVLForConditionalGeneration, config


def _single_patches(generator: torch.Generator, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(4 * h * w, 3, PATCH, PATCH, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}


def _kimi_k25(text: dict[str, Any], vision_options: dict[str, Any]) -> tuple[type, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"pos_emb_height": 8, "pos_emb_width": 8, **vision_options}
    text = {**text, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    text |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    text |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1}
    config = Kimi_K25Config(
        text_config=DeepseekV3Config(**text), vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        projection_hidden_size=32,
    )  # fmt: skip
    return Kimi_K25ForConditionalGeneration, config


def _single_frames(generator: torch.Generator, t: int, h: int, w: int) -> dict[str, Tensor]:
    pixels = torch.randn(t * 4 * h * w, 3, PATCH, PATCH, generator=generator)
    return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[t, 2 * h, 2 * w]])}


_TIMED_FRAMES = {
    "image": Kind(IMAGE, _qwen_image, *_AROUND, 1),
    "video": Kind(VIDEO, _qwen_video, *_AROUND, 2, time=(81, 82)),
}
_OMNI_KINDS = {"image": Kind(IMAGE, _qwen_image, *_AROUND), "video": Kind(VIDEO, _omni_video, *_AROUND)}
_OF_QWEN = {"n_position_axes": 3, "remembered": ("model.rope_deltas",)}
# Older transformers have the parts of a thinker on the thinker itself.
_FLAT = {"decoder": "model", "tower": "visual", "remembered": ("rope_deltas",)}
_OF_OMNI = {**_OF_QWEN, "positions_need_mask": True}
_OF_OMNI |= {} if hasattr(modeling_qwen2_5_omni, "Qwen2_5OmniThinkerModel") else _FLAT
# Newer transformers encode images before they are repeated.
IS_OLD = "mm_encoder_outputs" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters
_OF_OMNI |= {"repeats": "patches"} if IS_OLD else {}
_AS_IMAGES: dict[str, Any] = {"on_engine": False, "repeats": "images" if IS_OLD else "samples"}
_AS_PATCHES: dict[str, Any] = {"on_engine": False, "repeats": "patches" if IS_OLD else "samples"}
_OF_LLAVA = {"tower": "model.vision_tower"} | ({"repeats": "images"} if IS_OLD else {})
FAMILIES = {
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen_kinds(_timed_qwen_video), **_OF_QWEN),
    "qwen2_vl": Family(_qwen2_vl, _qwen_kinds(_qwen_video), **_OF_QWEN),
    "qwen3_vl": Family(_qwen3_vl, _TIMED_FRAMES, **_OF_QWEN, on_engine=False),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, _TIMED_FRAMES, **_OF_QWEN, on_engine=False),
    "qwen2_5_omni_thinker": Family(_qwen2_5_omni, _OMNI_KINDS, **_OF_OMNI, on_engine=False),
    "qwen3_omni_moe_thinker": Family(_qwen3_omni_moe, _OMNI_KINDS, **_OF_OMNI, on_engine=False),
    "llava": Family(_llava, {"image": Kind(IMAGE, _llava_image, size=(4, 4))}, **_OF_LLAVA, on_engine=False),
    "llava_next": Family(_llava_next, {"image": _IN_TILES}, tower="model.vision_tower", **_AS_IMAGES),
    "llava_onevision": Family(
        _llava_onevision, {"image": _IN_TILES, "video": _IN_FRAMES}, tower="model.vision_tower", **_AS_IMAGES
    ),
    "internvl": Family(
        _internvl,
        {"image": Kind(IMAGE, _three_tiles, (VISION_START,), (VISION_END,), size=(3, 2, 2))},
        tower="model.vision_tower",
        **_AS_IMAGES,
    ),
    "smolvlm": Family(
        _smolvlm, {"image": _TILES_APART}, decoder="model.text_model", tower="model.vision_model", **_AS_IMAGES
    ),
    "idefics3": Family(
        _idefics3, {"image": _TILES_APART}, decoder="model.text_model", tower="model.vision_model", **_AS_IMAGES
    ),
    "paligemma": Family(
        _paligemma,
        {"image": Kind(IMAGE, _small_image, size=(3, 3))},
        tower="model.vision_tower",
        **_AS_IMAGES,
        prefix=True,
    ),
    "ovis2": Family(
        _ovis2,
        {"image": Kind(IMAGE, _three_tiles, (81,), (82,), size=(3, 2, 2))},
        tower="model.vision_tower",
        **_AS_IMAGES,
    ),
    "deepseek_vl": Family(
        _deepseek_vl, {"image": Kind(IMAGE, _small_image, size=(3, 3))}, tower="model.vision_model", **_AS_IMAGES
    ),
    "mistral3": Family(_mistral3, {"image": _ENDED_ROWS}, tower="model.vision_tower", **_AS_IMAGES),
    "glm4v": Family(_glm(Glm4vConfig, Glm4vForConditionalGeneration, {}), _GLM_KINDS, on_engine=False, **_OF_QWEN),
    "glm46v": Family(_glm(Glm46VConfig, Glm46VForConditionalGeneration, {}), _GLM_KINDS, on_engine=False, **_OF_QWEN),
    "glm4v_moe": Family(
        _glm(
            Glm4vMoeConfig,
            Glm4vMoeForConditionalGeneration,
            {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        ),
        _GLM_KINDS,
        on_engine=False,
        **_OF_QWEN,
    ),
    "glm_ocr": Family(_glm(GlmOcrConfig, GlmOcrForConditionalGeneration, {}), _GLM_KINDS, on_engine=False, **_OF_QWEN),
    "paddleocr_vl": Family(
        _paddleocr_vl,
        {"image": Kind(IMAGE, _single_patches, (VISION_START,), (VISION_END,), 1)},
        on_engine=False,
        **_OF_QWEN,
    ),
    "kimi_k25": Family(
        _kimi_k25,
        {
            "image": Kind(IMAGE, _single_patches, (VISION_START,), (VISION_END,)),
            "video": Kind(
                VIDEO, _single_frames, (VISION_START,), (VISION_END,), tokens=lambda t, h, w: [VIDEO] * h * w
            ),
        },
        tower="model.vision_tower",
        **_AS_PATCHES,
    ),
}
ON_ENGINE = tuple(name for name, family in FAMILIES.items() if family.on_engine)


def family_of(model) -> Family:
    return FAMILIES[model.config.model_type]


def tiny_model(
    family: str = "qwen2_5_vl", attn: str = "sdpa", seed: int = 0, n_layers: int = N_LAYERS, vision_options=None
):
    """A random model whose attention is far from uniform, so that pruning changes its logits."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    cls, config = FAMILIES[family].make(text, vision_options or {})
    model = cls._from_config(config, attn_implementation=attn).eval()
    with torch.no_grad():
        for name, weight in FAMILIES[family].decoder_of(model).named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(6)
            if "q_norm.weight" in name or "k_norm.weight" in name:  # which take the length out again
                weight.mul_(1.5)
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as asked for
    model.generation_config.pad_token_id = PAD
    return model


def use_attention(model, name: str) -> None:
    """Set the decoder's attention by its bare name, without transformers' look at the hub."""
    for config in (model.config, family_of(model).decoder_of(model).config):  # generation looks at the whole model's
        config._attn_implementation_internal = name


def text(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, 80, (n,), generator=generator).tolist()


def make_inputs(*rows, seed: int = 0, pad: bool = True, family: str = "qwen2_5_vl"):
    """Inputs of a batch; each row is a list of ``("text", n)``, ``("image", h, w)``, ``("video", t, h, w)``.

    Heights and widths count visual (merged) tokens. Left padding, as ``generate`` wants it.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = FAMILIES[family].kinds
    ids, types, visual = [], [], {}
    for row in rows:
        row_ids, row_types = [], []
        for name, *asked in row:
            if name == "text":
                row_ids += text(asked[0], generator)
                row_types += [0] * asked[0]
                continue
            kind = kinds[name]
            size = kind.size_of(asked)
            own = kind.ids(size)
            row_ids += own
            row_types += [kind.token_type if token == kind.token else 0 for token in own]
            for key, value in kind.inputs(generator, *size).items():
                visual.setdefault(key, []).append(value)
        ids.append(row_ids)
        types.append(row_types)
    width = max(map(len, ids))

    def padded(values, filler):
        return torch.tensor([[filler] * (width - len(row)) + row for row in values])

    inputs = {"input_ids": padded(ids, PAD)}
    if all(kind.token_type is not None for kind in kinds.values()):
        inputs["mm_token_type_ids"] = padded(types, 0)
    if FAMILIES[family].prefix:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if pad:
        inputs["attention_mask"] = padded([[1] * len(row) for row in ids], 0)
    return inputs | {key: torch.cat(values) for key, values in visual.items()}


def equally_long(rows, family: str = "qwen2_5_vl"):
    """Rows that take no padding: short ones get more text at their end."""
    lengths = [make_inputs(row, family=family)["input_ids"].shape[1] for row in rows]
    return [
        row if length == max(lengths) else [*row, ("text", max(lengths) - length)]
        for row, length in zip(rows, lengths, strict=True)
    ]


def split_visual(inputs, rows, family: str = "qwen2_5_vl"):
    """The visual inputs of every sample, in prompt order: a list of dicts, one a row of ``rows``."""
    kinds, queues = FAMILIES[family].kinds, {}
    samples = []
    for row in rows:
        samples.append({})
        for name, *size in row:
            if name == "text":
                continue
            for key, value in kinds[name].inputs(torch.Generator(), *kinds[name].size_of(size)).items():
                start = queues.get(key, 0)
                queues[key] = start + value.shape[0]
                samples[-1].setdefault(key, []).append(inputs[key][start : queues[key]])
    return [{key: torch.cat(values) for key, values in sample.items()} for sample in samples]


def join_visual(samples):
    """The visual inputs of a batch from those of its samples."""
    keys = dict.fromkeys(key for sample in samples for key in sample)
    return {key: torch.cat([sample[key] for sample in samples if key in sample]) for key in keys}


PROMPTS = {
    "one image": [[("text", 3), ("image", 4, 6), ("text", 7)]],
    "image first": [[("image", 5, 4), ("text", 6)]],
    "two images": [[("text", 2), ("image", 4, 4), ("text", 4), ("image", 3, 6), ("text", 5)]],
    "video": [[("text", 2), ("video", 3, 3, 4), ("text", 6)]],
    "image and video": [[("image", 4, 4), ("text", 3), ("video", 2, 4, 4), ("text", 5)]],
    "batch, same size": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 3), ("image", 4, 6), ("text", 7)],
    ],
    "batch, left padding": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 2), ("image", 4, 6), ("text", 3)],
    ],
    "batch, unequal counts": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 9), ("image", 3, 4), ("text", 4), ("image", 4, 4), ("text", 2)],
        [("text", 12)],
    ],
}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def pairwise(values):
    return list(itertools.pairwise(values))
