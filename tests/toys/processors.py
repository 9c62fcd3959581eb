"""Checkpoints of the toys with the real processors of transformers, one a family."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sparsevlm.inputs import torchvision_works

from .kinds import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    INDICATORS,
    IS_OLD,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
)
from .processed import Processed, made

# What older transformers have torchvision for, newer ones do with Pillow.
_FORMERLY = ("torchvision",) if IS_OLD else ()
_SIDE = 2 * PATCH  # of a visual token of two patches a side
_SMALL = {"shortest_edge": _SIDE**2, "longest_edge": 64 * _SIDE**2}
_PACKED = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": _SMALL}
_TILE = {"height": 4 * PATCH, "width": 4 * PATCH}


_QWEN_TOKENS = {
    "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END,
}  # fmt: skip
_QWEN_IMAGE, _QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))


def _qwen(name: str, video_processor: str = "Qwen2VLVideoProcessor", video: str = _QWEN_VIDEO) -> Processed:
    size = {"shortest_edge": _SIDE**2, "longest_edge": 512 * _SIDE**2}
    parts = made(
        image_processor=("Qwen2VLImageProcessor", _PACKED),
        video_processor=(video_processor, {**_PACKED, "size": size, "do_sample_frames": False}),
    )
    return Processed(name, _QWEN_TOKENS, _QWEN_IMAGE, parts, video, needs=("torchvision",))


_QWEN3 = _qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor", "<|video_pad|>")
_OMNI_NAMES = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>",
}  # fmt: skip
_OMNI_TOKENS = {
    **_QWEN_TOKENS, "<|audio_pad|>": AUDIO, "<|audio_start|>": AUDIO_START, "<|audio_end|>": AUDIO_END,
}  # fmt: skip


def _omni(name: str) -> Processed:
    video = {**_PACKED, "size": {**_SMALL, "longest_edge": 512 * _SIDE**2}, "do_sample_frames": False}
    parts = made(
        image_processor=("Qwen2VLImageProcessor", _PACKED),
        video_processor=("Qwen2VLVideoProcessor", video),
        feature_extractor=("WhisperFeatureExtractor", {"feature_size": 16}),
    )
    return Processed(name, _OMNI_TOKENS, _QWEN_IMAGE, parts, _QWEN_VIDEO, _OMNI_NAMES, needs=("torchvision",))


_GLM_TOKENS = {
    "<|image|>": IMAGE, "<|video|>": VIDEO, "<|begin_of_image|>": VISION_START, "<|end_of_image|>": VISION_END,
    "<|begin_of_video|>": 87, "<|end_of_video|>": 88,
}  # fmt: skip


def _glm(name: str) -> Processed:
    video = {**_PACKED, "size": {**_SMALL, "longest_edge": 512 * _SIDE**2}, "do_sample_frames": False}
    parts = made(
        image_processor=(f"{name}ImageProcessor", {**_PACKED, "size": {**_SMALL, "longest_edge": 128 * _SIDE**2}}),
        video_processor=(f"{name}VideoProcessor", video),
    )
    image, video_tokens = (f"<|begin_of_{kind}|><|{kind}|><|end_of_{kind}|>" for kind in ("image", "video"))
    return Processed(f"{name}Processor", _GLM_TOKENS, image, parts, video_tokens, needs=("torchvision",))


_SMALL_TILE, _PINPOINTS = 3 * PATCH, [[3 * PATCH, 6 * PATCH], [6 * PATCH, 3 * PATCH], [6 * PATCH, 6 * PATCH]]
_SQUARE = {"height": _SMALL_TILE, "width": _SMALL_TILE}
_CLASS_TOKEN = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_OF_IDEFICS = {
    "<image>": IMAGE, "<fake_token_around_image>": 80, "<end_of_utterance>": 79, "<global-img>": 78,
    **{f"<row_{row}_col_{column}>": 50 + 6 * row + column for row in range(1, 4) for column in range(1, 5)},
}  # fmt: skip
_PALIGEMMA = Processed(
    "PaliGemmaProcessor",
    {"<image>": IMAGE},
    "<image>",
    made(image_processor=("SiglipImageProcessor", {"size": _SQUARE, "image_seq_length": 9})),
    named={"image_token": "<image>"},
    has_template=False,
)


def _gemma4(name: str) -> Processed:
    """Of 70 visual tokens a picture or frame, at most: the least that it takes."""
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    parts = made(
        image_processor=(f"{name}ImageProcessor", sizes),
        video_processor=(f"{name}VideoProcessor", {**sizes, "do_sample_frames": False}),
        feature_extractor=(f"{name}AudioFeatureExtractor", {}),
    )
    tokens = {
        "<|image|>": IMAGE, "<|video|>": VIDEO, "<|image>": VISION_START, "<image|>": VISION_END,
        "<|audio|>": AUDIO, "<|audio>": AUDIO_START, "<audio|>": AUDIO_END,
    }  # fmt: skip
    named = {
        "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
        "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
    }  # fmt: skip
    return Processed(f"{name}Processor", tokens, "<|image|>", parts, "<|video|>", named, needs=("torchvision",))


# Older transformers encode pictures and slices of one size only.
_MINICPMV_IMAGES = {"patch_size": 4, "scale_resolution": 64, "max_slice_nums": 1 if IS_OLD else 9}
_MINICPMV_NAMES = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "image_start_token": "<image>", "image_end_token": "</image>",
    "slice_start_token": "<slice>", "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip
_IDEFICS_IMAGES = {"size": {"longest_edge": 12 * PATCH}, "max_image_size": {"longest_edge": 4 * PATCH}}
PROCESSED: dict[str, Processed] = {
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "qwen2_5_omni_thinker": _omni("Qwen2_5OmniProcessor"),
    "qwen3_omni_moe_thinker": _omni("Qwen3OmniMoeProcessor"),
    "minicpmv4_6": Processed(
        "MiniCPMV4_6Processor",
        {
            "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<image>": VISION_START, "</image>": VISION_END,
            "<slice>": 80, "</slice>": 79, "<image_id>": 78, "</image_id>": 77,
        },
        "<|image_pad|>",
        made(
            image_processor=("MiniCPMV4_6ImageProcessor", _MINICPMV_IMAGES),
            video_processor=("MiniCPMV4_6VideoProcessor", {**_MINICPMV_IMAGES, "do_sample_frames": False}),
        ),
        "<|video_pad|>",
        _MINICPMV_NAMES,
        needs=("torchvision",),
    ),
    "llava": Processed(
        "LlavaProcessor",
        {"<image>": IMAGE},
        "<image>\n",
        made(image_processor=("CLIPImageProcessor", {"size": {"shortest_edge": 4 * PATCH}, "crop_size": _TILE})),
        options=_CLASS_TOKEN,
    ),
    "llava_next": Processed(
        "LlavaNextProcessor",
        {"<image>": IMAGE},
        "<image>\n",
        made(
            image_processor=(
                "LlavaNextImageProcessor",
                {"size": {"shortest_edge": _SMALL_TILE}, "crop_size": _SQUARE, "image_grid_pinpoints": _PINPOINTS},
            )
        ),
        options=_CLASS_TOKEN,
    ),
    "llava_onevision": Processed(
        "LlavaOnevisionProcessor",
        {"<image>": IMAGE, "<video>": VIDEO},
        "<image>\n",
        made(
            image_processor=("LlavaOnevisionImageProcessor", {"size": _SQUARE, "image_grid_pinpoints": _PINPOINTS}),
            video_processor=("LlavaOnevisionVideoProcessor", {"size": _SQUARE, "do_sample_frames": False}),
        ),
        "<video>\n",
        options={"num_image_tokens": 9, "vision_feature_select_strategy": "full"},
        needs=("torchvision",),
    ),
    "internvl": Processed(
        "InternVLProcessor",
        {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": VISION_START, "</img>": VISION_END},
        "<IMG_CONTEXT>\n",
        made(
            image_processor=("GotOcr2ImageProcessor", {"size": _TILE, "crop_to_patches": True, "max_patches": 6}),
            video_processor=("InternVLVideoProcessor", {"size": _TILE, "do_sample_frames": False}),
        ),
        "<video>\n",
        {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        {"image_seq_length": 4},
        needs=("torchvision",),
    ),
    "idefics3": Processed(
        "Idefics3Processor",
        _OF_IDEFICS,
        "<image>",
        made(image_processor=("Idefics3ImageProcessor", _IDEFICS_IMAGES)),
        options={"image_seq_len": 4},
        needs=_FORMERLY,
    ),
    "smolvlm": Processed(
        "SmolVLMProcessor",
        _OF_IDEFICS,
        "<image>",
        made(
            image_processor=("SmolVLMImageProcessor", _IDEFICS_IMAGES),
            video_processor=("SmolVLMVideoProcessor", {**_IDEFICS_IMAGES, "num_frames": 4, "fps": 1}),
        ),
        "<video>",
        options={"image_seq_len": 4},
        needs=("torchvision", "num2words"),
    ),
    "gemma3": Processed(
        "Gemma3Processor",
        {"<image_soft_token>": IMAGE, "<start_of_image>": VISION_START, "<end_of_image>": VISION_END},
        "<start_of_image>",
        made(image_processor=("Gemma3ImageProcessor", {"size": {"height": 8 * PATCH, "width": 8 * PATCH}})),
        named={
            "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        },
        options={"image_seq_length": 16},
    ),
    "gemma4": _gemma4("Gemma4"),
    "gemma4_unified": _gemma4("Gemma4Unified"),
    "paligemma": _PALIGEMMA,
    "paligemma2": _PALIGEMMA,
    "ovis2": Processed(
        "Ovis2Processor",
        {
            "<image>": 80, "<IMG_ATOM>": IMAGE,
            **dict(zip(("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"), INDICATORS, strict=True)),
        },
        "<image>\n",
        made(image_processor=("Ovis2ImageProcessor", {"size": _TILE, "crop_to_patches": True, "max_patches": 6})),
        options={"image_seq_length": 4},
        needs=_FORMERLY,
    ),
    "deepseek_vl": Processed(
        "DeepseekVLProcessor",
        {"<image_placeholder>": IMAGE},
        "<image_placeholder>",
        made(image_processor=("DeepseekVLImageProcessor", {"size": _SQUARE})),
        named={"image_token": "<image_placeholder>"},
        options={"num_image_tokens": 9},
    ),
    "mistral3": Processed(
        "PixtralProcessor",
        {"[IMG]": IMAGE, "[IMG_BREAK]": 80, "[IMG_END]": 81},
        "[IMG]",
        made(
            image_processor=("PixtralImageProcessor", {"size": {"longest_edge": 12 * PATCH}, "patch_size": PATCH})
        ),
        options={"patch_size": PATCH, "spatial_merge_size": 2},
        needs=("torchvision",),
    ),
    "lighton_ocr": Processed(
        "LightOnOcrProcessor",
        {"<|image_pad|>": IMAGE, "<|vision_pad|>": 80, "<|vision_end|>": 81},
        "<|image_pad|>",
        made(
            image_processor=("PixtralImageProcessor", {"size": {"longest_edge": 12 * PATCH}, "patch_size": PATCH})
        ),
        named={
            "image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>",
        },
        options={"patch_size": PATCH, "spatial_merge_size": 2},
    ),
    "glm4v": _glm("Glm4v"),
    "glm4v_moe": _glm("Glm4v"),
    "glm46v": _glm("Glm46V"),
    "glm_ocr": _glm("Glm46V"),
    "paddleocr_vl": Processed(
        "PaddleOCRVLProcessor",
        {"<|IMAGE_PLACEHOLDER|>": IMAGE, "<|IMAGE_START|>": VISION_START, "<|IMAGE_END|>": VISION_END},
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        made(
            image_processor=(
                "PaddleOCRVLImageProcessor",
                {"patch_size": PATCH, "merge_size": 2, "size": _SMALL, "temporal_patch_size": 1},
            )
        ),
        named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        needs=_FORMERLY,
    ),
    "kimi_k25": Processed(
        "Kimi_K25Processor",
        {
            "<|media_pad|>": IMAGE, "<|kimi_k25_video_placeholder|>": VIDEO, "<|media_begin|>": VISION_START,
            "<|media_content|>": 80, "<|media_end|>": VISION_END,
        },
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        made(
            image_processor=("Kimi_K25ImageProcessor", {"patch_size": PATCH, "merge_size": 2}),
            video_processor=(
                "Kimi_K25VideoProcessor",
                {"patch_size": PATCH, "merge_size": 2, "do_sample_frames": False},
            ),
        ),
        "<|kimi_k25_video_placeholder|>",
        needs=("torchvision",),
    ),
}  # fmt: skip


def missing_packages(family: str) -> list[str]:
    """Packages that the processor of a family needs and that are not installed, or cannot be imported."""
    works = {"torchvision": torchvision_works}
    return [
        name
        for name in PROCESSED[family].needs
        if not works.get(name, lambda name=name: importlib.util.find_spec(name) is not None)()
    ]


def save_processor(family: str, folder: Path) -> Path:
    """Write the processor of a family to the folder of its checkpoint."""
    PROCESSED[family].make().save_pretrained(folder)
    return folder
