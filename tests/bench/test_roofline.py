"""Roofline bounds of models whose towers or layers are others than Qwen's."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.bench.cases import Case
from sparsevlm.bench.roofline import Roofline, roofline_bounds, weights_of
from sparsevlm.models import adapter_for, blank_word
from toys import tiny_model


def test_a_tower_of_unknown_blocks_is_read_at_least():
    adapter = adapter_for(tiny_model("minicpmv4_6"))
    found = roofline_bounds(adapter, Case(80, 4, 1), [80] * adapter.n_layers, Roofline(1.0, 1e3))
    assert found["vision"] == 4 * weights_of(adapter)["vision"]


def decode_bytes(adapter, n_tokens, batch=1):
    case = Case(1, batch, 2, n_text=n_tokens - 1)
    return roofline_bounds(adapter, case, [1] * adapter.n_layers, Roofline(1.0, 1e3))["decode_per_token"]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "gemma3"])
def test_a_decode_step_reads_the_keys_and_values_that_are_cached(family):
    model = tiny_model(family)
    adapter = adapter_for(model)
    cached = model(input_ids=torch.full((1, 8), blank_word(adapter))).past_key_values
    layers = [layer for layer in cached.layers if getattr(layer, "keys", None) is not None]
    n_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert decode_bytes(adapter, 8, batch=2) - decode_bytes(adapter, 8) == n_bytes


def test_a_decode_step_reads_a_window():
    adapter = adapter_for(tiny_model("gemma3"))
    config, n_full = adapter.decoder.module.config, adapter.decoder.layer_types.count("full_attention")
    per_token = 2 * config.num_key_value_heads * config.head_dim * 4
    n_more = n_full * (40 - 8) + (adapter.n_layers - n_full) * (config.sliding_window - 8)
    assert 8 < config.sliding_window < 40
    assert decode_bytes(adapter, 40) - decode_bytes(adapter, 8) == per_token * n_more
