"""Tiny random Qwen2-VL / Qwen2.5-VL models and inputs, made in code."""

from __future__ import annotations

import itertools

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 90, 91, 92, 93, 94, 95
PATCH = 14
N_LAYERS = 6


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
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 56}
        vision |= {"fullatt_block_indexes": [1]}
        cls, config = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig
    else:
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        cls, config = Qwen2VLForConditionalGeneration, Qwen2VLConfig
    vision |= vision_options or {}
    model = cls._from_config(config(text_config=text, vision_config=vision, **ids), attn_implementation=attn).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
                weight.mul_(6)
    model.generation_config.eos_token_id = None  # generate exactly as many tokens as asked for
    model.generation_config.pad_token_id = PAD
    return model


def use_attention(model, name: str) -> None:
    """Set an attention by its bare name, without transformers' look at the hub."""
    model.model.language_model.config._attn_implementation_internal = name


def text(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, 80, (n,), generator=generator).tolist()


def make_inputs(*rows, seed: int = 0, pad: bool = True):
    """Inputs of a batch; each row is a list of ``("text", n)``, ``("image", h, w)``, ``("video", t, h, w)``.

    Heights and widths count visual (merged) tokens. Left padding, as ``generate`` wants it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, types, pixels = [], [], {"image": [], "video": []}
    grids = {"image": [], "video": []}
    for row in rows:
        row_ids, row_types = [], []
        for kind, *size in row:
            if kind == "text":
                row_ids += text(size[0], generator)
                row_types += [0] * size[0]
                continue
            t, h, w = size if kind == "video" else (1, *size)
            row_ids += [VISION_START, *[IMAGE if kind == "image" else VIDEO] * (t * h * w), VISION_END]
            row_types += [0, *[1 if kind == "image" else 2] * (t * h * w), 0]
            grids[kind].append([t, 2 * h, 2 * w])
            pixels[kind].append(torch.randn(t * 4 * h * w, 3 * 2 * PATCH * PATCH, generator=generator))
        ids.append(row_ids)
        types.append(row_types)
    width = max(map(len, ids))
    padded = {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in ids]),
        "mm_token_type_ids": torch.tensor([[0] * (width - len(row)) + row for row in types]),
    }
    if pad:
        padded["attention_mask"] = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    if pixels["image"]:
        padded["pixel_values"] = torch.cat(pixels["image"])
        padded["image_grid_thw"] = torch.tensor(grids["image"])
    if pixels["video"]:
        padded["pixel_values_videos"] = torch.cat(pixels["video"])
        padded["video_grid_thw"] = torch.tensor(grids["video"])
        padded["second_per_grid_ts"] = torch.ones(len(grids["video"]))
    return padded


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
