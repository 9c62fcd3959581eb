"""On a GPU: dropped keys and values are freed, by the bytes that the report claims, and the peak is no higher."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sparsevlm import apply_sparsevlm
from toys import IMAGE, PAD, VIDEO, VISION_END, VISION_START, make_inputs

pytestmark = pytest.mark.gpu


def wide_model():
    """Few layers, wide enough that the cache is many megabytes."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 96,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 16384,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
        "pad_token_id": PAD,
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "out_hidden_size": 1024,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    return model.eval().to("cuda", torch.bfloat16)


def measured(model, inputs):
    """Bytes allocated after the prefill beyond those before, and the peak beyond those before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    del output
    gc.collect()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    del cache
    return allocated, peak


@pytest.mark.parametrize(
    "rows",
    [
        [[("text", 9), ("image", 64, 64), ("text", 30)]],
        [[("image", 32, 32), ("text", 30)], [("image", 20, 40), ("text", 9)]],
    ],
    ids=["one large image", "unequal batch"],
)
def test_freed_bytes_are_those_reported(rows):
    model, inputs = wide_model(), {k: v.cuda() for k, v in make_inputs(*rows).items()}
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    measured(model, inputs)  # first-call workspaces
    dense, dense_peak = measured(model, inputs)
    with apply_sparsevlm(model, keep=0.4) as state:
        measured(model, inputs)
        sparse, sparse_peak = measured(model, inputs)
        claimed = state.report.kv_bytes
    saved = claimed.dense - claimed.sparse
    print(f"claimed {saved / 1e6:.2f} MB, freed {(dense - sparse) / 1e6:.2f} MB, peaks {dense_peak} {sparse_peak}")
    assert dense - sparse == pytest.approx(saved, rel=0.05)
    assert sparse_peak <= dense_peak
