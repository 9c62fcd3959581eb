"""Decoder layers with a sliding window: masked by position, their caches, figures and refusals."""

from __future__ import annotations

import flash_emulation
import pytest
import torch
from runs import GREEDY, VARIANTS, build, check_generated, check_second_turn
from transformers import DynamicCache

from sparsevlm import apply_sparsevlm
from sparsevlm.engine.support import unsupported_mode
from sparsevlm.hooks.masks import pruned_mask
from sparsevlm.models import adapter_for
from sparsevlm.request.costs import prefill_flops
from sparsevlm.request.kv_cache import PrunedSlidingLayer
from toys import PROMPTS, make_inputs, tiny_model, use_attention

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3], "selector": "random"}
LOGITS = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def test_a_mask_shorter_than_the_sequence_ends_with_it():
    """Of eight positions it shows those from 4 on; what is left of 0 to 3 is out of the window."""
    mask = torch.tensor([True, True, False, True]).view(1, 1, 1, 4)
    slots = torch.tensor([[0, 3, 4, 6, 7]])
    made = pruned_mask(mask, None, slots, past_len=7, q_len=1, has_padding=False, flash=False)
    assert made.flatten().tolist() == [False, False, True, False, True]


def test_caches_keep_the_window_before_the_first_drop_and_all_behind_it():
    model, inputs = tiny_model("gemma3"), make_inputs(*PROMPTS["two images"], family="gemma3")
    state = apply_sparsevlm(model, **OPTIONS)
    with state.options(keep=1.0):
        model.generate(**inputs, max_new_tokens=1)
    assert state.report.kv_note is None
    output = model.generate(**inputs, **LOGITS)
    layers = output.past_key_values.layers
    window, length = 12, output.sequences.shape[1] - 1
    (sample,) = state.report.samples
    kinds = state.adapter.decoder.layer_types
    for layer, kind, n_visual in zip(layers, kinds, sample.layer_tokens, strict=True):
        is_bound = kind == "sliding_attention" and n_visual == sample.n_visual
        expected = window - 1 if is_bound else length - sample.n_visual + n_visual
        assert layer.keys.shape[-2] == expected
        assert int(layer.get_seq_length()) == length
    assert "sliding-window layers: behind the first drop" in state.report.kv_note
    dense = sum(window - 1 if kind == "sliding_attention" else inputs["input_ids"].shape[1] for kind in kinds)
    assert state.report.kv_bytes.dense == dense * 2 * 2 * 16 * 4  # keys and values of two heads of 16 in float32
    output.past_key_values.reset()
    assert {int(layer.get_seq_length()) for layer in layers} == {0}
    pruned = [layer for layer in layers if isinstance(layer, PrunedSlidingLayer)]
    assert all(layer.table is None for layer in pruned)
    again = model.generate(**inputs, **LOGITS, past_key_values=output.past_key_values)
    assert torch.equal(again.sequences, output.sequences)


def test_flash_attention_is_refused_once_something_is_dropped():
    model, inputs = tiny_model("gemma3"), make_inputs(*PROMPTS["one image"], family="gemma3")
    state = apply_sparsevlm(model, **{**OPTIONS, "target_layers": [1]})
    use_attention(model, flash_emulation.register())
    with pytest.raises(NotImplementedError, match="layer 2 has a sliding window, which flash attention counts in"):
        model.generate(**inputs, max_new_tokens=2)
    with state.options(keep=1.0):
        model.generate(**inputs, max_new_tokens=2)


def test_static_caches_with_a_window_are_refused():
    model, inputs = tiny_model("gemma3"), make_inputs(*PROMPTS["one image"], family="gemma3")
    apply_sparsevlm(model, **OPTIONS)
    with pytest.raises(NotImplementedError, match="StaticSlidingWindowLayer cannot hold a pruned sequence"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


WINDOWS = {
    "mistral3": {"sliding_window": 12},  # in all layers
    "internvl": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},  # from the third on
}


@pytest.mark.parametrize("variant", ["by attention", "before the decoder"])
@pytest.mark.parametrize("family", WINDOWS)
def test_windows_of_other_text_models(family, variant, place):
    options = {"text_options": WINDOWS[family], "family": family}
    run = build(PROMPTS["batch, unequal counts"], VARIANTS[variant], place, **options)
    kinds = run.state.adapter.decoder.layer_types
    assert kinds.count("sliding_attention") == (6 if family == "mistral3" else 4)
    assert run.inputs["input_ids"].shape[1] > 3 * 12
    check_generated(run, run.model.generate(**run.inputs, **GREEDY))
    check_second_turn(build(PROMPTS["batch, left padding"], VARIANTS[variant], place, **options), [("text", 6)])


def test_a_cache_without_windows_serves_layers_with_them(place):
    run = build(PROMPTS["two images"], VARIANTS["random"], place, family="gemma3")
    check_generated(run, run.model.generate(**run.inputs, **GREEDY, past_key_values=DynamicCache()))


def test_default_targets_are_the_layers_with_full_attention():
    model = tiny_model("gemma3", n_layers=9)
    assert adapter_for(model).decoder.default_targets == (1, 4, 7)
    assert adapter_for(tiny_model()).decoder.default_targets == (2,)


def test_flops_of_a_layer_with_a_window_count_its_length_at_most():
    adapter = adapter_for(tiny_model("gemma3", n_layers=2))  # the first with a window of 12
    assert adapter.decoder.layer_types == ("sliding_attention", "full_attention")
    tokens, past_len, width = 20, 5, 4 * 16
    windowed = sum(min(12, past_len + i + 1) for i in range(tokens))
    full = sum(past_len + i + 1 for i in range(tokens))
    first, second = (prefill_flops(adapter, counts, past_len) for counts in ([tokens, 0], [0, tokens]))
    assert second - first == 4 * width * (full - windowed)


def test_other_kinds_of_layers_are_refused_by_name():
    model = tiny_model("gemma3")
    model.model.language_model.config.layer_types = ["chunked_attention"] * 6
    with pytest.raises(NotImplementedError, match="layers of kind 'chunked_attention' are not supported"):
        adapter_for(model)


def test_engine_leaves_windows_to_the_hooks():
    model = tiny_model()
    config = model.model.language_model.config
    config.layer_types = ["sliding_attention"] * 6
    assert unsupported_mode(adapter_for(model)) == "decoder layers with a sliding window"
