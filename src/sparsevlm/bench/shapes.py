"""Qwen2.5-VL models of published shapes with random weights, which take as long as trained ones."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

_TEXT = {
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
}  # fmt: skip
_VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
_TINY_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "fullatt_block_indexes": [1]
}  # fmt: skip
_SECTIONS = {"tiny": [2, 3, 3]}
_MROPE = [16, 24, 24]
SHAPES = tuple(_TEXT)
_SCALE = 0.02


def random_model(
    shape: str, device: str, dtype: torch.dtype, attn: str, layers: int | None = None, blocks: int | None = None
) -> Any:
    """Makes a Qwen2.5-VL of a published shape with random weights.

    Parameters
    ----------
    shape : {"7b", "3b", "tiny"}
        ``tiny`` is no published one: it tries things out.
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
    """Makes a Qwen2.5-VL of a published shape with uninitialised weights on the default device."""
    if shape not in _TEXT:
        raise ValueError(f"there is no shape {shape!r}; there are {', '.join(SHAPES)}.")
    sections = _SECTIONS.get(shape, _MROPE)
    text = {
        **_TEXT[shape],
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": sections},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
    }
    ids: dict[str, Any] = {
        "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "tie_word_embeddings": shape == "3b",
    }  # fmt: skip
    vision = {**_VISION, **(_TINY_VISION if shape == "tiny" else {}), "out_hidden_size": text["hidden_size"]}
    text |= {} if layers is None else {"num_hidden_layers": layers}
    vision |= {} if blocks is None else {"depth": blocks}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn, dtype=dtype)


@torch.no_grad()
def with_random_weights(model: Any) -> Any:
    """Fills a model with random weights, and its buffers as their modules compute them."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):  # the only buffers
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(getattr(module, name).device))
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("ln_q.weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, _SCALE)
    model.tie_weights()
    return model
