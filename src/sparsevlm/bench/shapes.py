"""Models of published shapes with random weights, which take as long as trained ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

_SCALE = 0.02
# Qwen's ids, of Qwen2.5-VL and Qwen3-VL.
_QWEN_TEXT: dict[str, Any] = {"bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643}
_QWEN_IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Class and dimensions of a model.

    Attributes
    ----------
    family : str
        How the names of transformers' classes begin: ``<family>Config`` and ``<family>ForConditionalGeneration``.
    text, vision, rest : dict
        Of the configuration: of its text model, of its vision tower, and all other values.
    """

    family: str
    text: dict[str, Any]
    vision: dict[str, Any]
    rest: dict[str, Any] = field(default_factory=dict)

    def smaller(self, text: dict[str, Any], vision: dict[str, Any]) -> Shape:
        """The same with other dimensions."""
        return Shape(self.family, self.text | text, self.vision | vision, self.rest)


def _qwen2_5_vl(n_vocabulary: int, is_tied: bool = False, **text: Any) -> Shape:
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": text["hidden_size"],
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text |= {"max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "rope_parameters": rope}
    text |= {"vocab_size": n_vocabulary, **_QWEN_TEXT}
    return Shape("Qwen2_5_VL", text, vision, {**_QWEN_IDS, "tie_word_embeddings": is_tied})


# config.json of Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct.
_QWEN2_5_VL_7B = _qwen2_5_vl(
    152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4,
)  # fmt: skip
_QWEN2_5_VL_3B = _qwen2_5_vl(
    151936, is_tied=True, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
    num_key_value_heads=2,
)  # fmt: skip
# config.json of Qwen/Qwen3-VL-8B-Instruct.
_QWEN3_VL_8B = Shape(
    "Qwen3VL",
    {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6, **_QWEN_TEXT,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True, "mrope_section": [24, 20, 20]
        },
    },
    {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 2304, "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    {**_QWEN_IDS, "tie_word_embeddings": False},
)  # fmt: skip
# config.json of llava-hf/llava-1.5-7b-hf; what it leaves out of Vicuna-7B is LlamaConfig's default.
_LLAVA_1_5_7B = Shape(
    "Llava",
    {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001,
    },
    {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
    },
    {
        "image_token_index": 32000, "image_seq_length": 576, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    },
)  # fmt: skip
# config.json of OpenGVLab/InternVL3-8B-hf, whose dynamic positions scale nothing up to 32768 tokens.
_INTERNVL3_8B = Shape(
    "InternVL",
    {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151674, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, **_QWEN_TEXT,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0},
    },
    {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True, "use_qk_norm": False,
        "norm_type": "layer_norm", "use_mean_pooling": True, "use_absolute_position_embeddings": True,
    },
    {
        "image_token_id": 151667, "image_seq_length": 256, "downsample_ratio": 0.5, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    },
)  # fmt: skip

_TINY_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_TINY_TOWER = {"hidden_size": 32, "intermediate_size": 48}
_TINY_PACKED = {**_TINY_TOWER, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
_TINY_TILED = {**_TINY_TOWER, "num_hidden_layers": 3, "num_attention_heads": 2}


def _sections(shape: Shape, *sections: int) -> dict[str, Any]:
    """Rotary positions for smaller heads."""
    return {"rope_parameters": {**shape.text["rope_parameters"], "mrope_section": list(sections)}}


# Tiny ones have the images and the tokens of their families.
_SHAPES = {
    "7b": _QWEN2_5_VL_7B,
    "3b": _QWEN2_5_VL_3B,
    "qwen3-vl-8b": _QWEN3_VL_8B,
    "llava-1.5-7b": _LLAVA_1_5_7B,
    "internvl3-8b": _INTERNVL3_8B,
    "tiny": _QWEN2_5_VL_7B.smaller(
        {**_TINY_TEXT, **_sections(_QWEN2_5_VL_7B, 2, 3, 3), "vocab_size": 151936},
        {**_TINY_PACKED, "fullatt_block_indexes": [1]},
    ),
    "qwen3-vl-tiny": _QWEN3_VL_8B.smaller(
        {**_TINY_TEXT, **_sections(_QWEN3_VL_8B, 4, 2, 2), "head_dim": 16},
        {**_TINY_PACKED, "depth": 3, "deepstack_visual_indexes": [0, 1]},
    ),
    "llava-tiny": _LLAVA_1_5_7B.smaller(_TINY_TEXT, {**_TINY_TILED, "projection_dim": 32}),
    "internvl-tiny": _INTERNVL3_8B.smaller(_TINY_TEXT, _TINY_TILED),
}
SHAPES = tuple(_SHAPES)


def shape_label(name: str) -> str:
    """Name of a shape as it stands in the rows."""
    return f"{name} shape, random weights"


def random_model(
    shape: str, device: str, dtype: torch.dtype, attn: str, layers: int | None = None, blocks: int | None = None
) -> Any:
    """Makes a model of a published shape with random weights.

    Parameters
    ----------
    shape : str
        One of :data:`SHAPES`; the tiny ones are not published: they try things out.
    device : str
    dtype : torch.dtype
    attn : str
    layers, blocks : int, optional
        Of the decoder and of the vision tower; all, if not given.

    Raises
    ------
    ValueError
        If there is no such shape.
    """
    with torch.device("meta"):
        model = empty_model(shape, dtype, attn, layers, blocks)
    return with_random_weights(model.to_empty(device=device)).eval()


def empty_model(shape: str, dtype: torch.dtype, attn: str, layers: int | None = None, blocks: int | None = None) -> Any:
    """Makes a model of a published shape with uninitialised weights on the default device."""
    if shape not in _SHAPES:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}.")
    found = _SHAPES[shape]
    text = found.text | ({} if layers is None else {"num_hidden_layers": layers})
    depth = "depth" if "depth" in found.vision else "num_hidden_layers"
    vision = found.vision | ({} if blocks is None else {depth: blocks})
    config = getattr(transformers, f"{found.family}Config")(text_config=text, vision_config=vision, **found.rest)
    model_class = getattr(transformers, f"{found.family}ForConditionalGeneration")
    return model_class._from_config(config, attn_implementation=attn, dtype=dtype)


@torch.no_grad()
def with_random_weights(model: Any) -> Any:
    """Fills a model with random weights, and its buffers as their modules compute them."""
    for module in model.modules():
        if next(module.buffers(recurse=False), None) is not None:
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(getattr(module, name).device))
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("ln_q.weight"):
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            weight.normal_(0.0, _SCALE)
    model.tie_weights()
    return model
