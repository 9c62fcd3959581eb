"""Checkpoints of tiny random models of sizes that vLLM's kernels take, with real processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from toys.kinds import EOS, PAD, PATCH
from toys.processors import PROCESSED
from toys.qwen import QWEN

_TEXT = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 4096, "rope_theta": 10000.0,
    "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
}  # fmt: skip
_TOWER = {
    "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128,
}  # fmt: skip
_DEEPSTACK = {"depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 256}
_INTERLEAVED = {"head_dim": 32, "rope_parameters": {**_TEXT["rope_parameters"], "mrope_interleaved": True}}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": ("Qwen2_5_VL", {}, {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}),
    "qwen2_vl": ("Qwen2VL", {}, {"embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2}),
    "qwen3_vl": ("Qwen3VL", _INTERLEAVED, _DEEPSTACK),
}


def write_checkpoint(kind: str, folder: Path) -> Path:
    """Write model and processor of a family."""
    name, text, tower = KINDS[kind]
    tower = {**_TOWER, **tower}
    if kind == "qwen2_vl":
        tower = {key: value for key, value in tower.items() if key not in ("intermediate_size", "out_hidden_size")}
    config = getattr(transformers, f"{name}Config")(
        text_config={**_TEXT, **text}, vision_config=tower, tie_word_embeddings=False, **QWEN
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    # Larger than a model starts with, so that answers depend on what is seen.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 1.5 * parameter.shape[-1] ** -0.5
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor = PROCESSED[kind].make()
    # Published ones have one mean for both, and newer vLLM takes that of images alone.
    processor.image_processor.image_mean = processor.video_processor.image_mean
    processor.image_processor.image_std = processor.video_processor.image_std
    processor.save_pretrained(folder)
    return folder
