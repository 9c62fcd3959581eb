"""Decoders with recurrent layers: which targets they take, what is said of their states, and what is refused."""

from __future__ import annotations

import pytest
import torch
from runs import GREEDY, IMAGE_TURNS, VARIANTS, build, check_generated, take_second_turn

from sparsevlm import apply_sparsevlm
from sparsevlm.hooks.masks import row_mask
from sparsevlm.models import adapter_for
from sparsevlm.request.costs import prefill_flops
from toys import PROMPTS, make_inputs, tiny_model


def test_default_targets_are_the_layers_with_attention():
    model = tiny_model("qwen3_5")
    assert apply_sparsevlm(model, keep=0.9).adapter.decoder.default_targets == (1, 3)
    assert [attention is None for attention in adapter_for(model).decoder.attentions] == [True, False] * 3


@pytest.mark.parametrize(
    ("options", "reads"),
    [
        ({"selector": "sparsevlm", "keep": 0.7}, "selector 'sparsevlm' reads"),
        ({"selector": "fastv", "keep": 0.7}, "selector 'fastv' reads"),
        ({"selector": "span"}, "without keep the rank decides"),
    ],
)
def test_a_recurrent_target_is_refused_where_attention_is_read(options, reads):
    model = tiny_model("qwen3_5")
    with pytest.raises(ValueError, match=rf"target_layers \[2\] of a Qwen3_5.* are recurrent, and {reads}.*\[1, 3\]"):
        apply_sparsevlm(model, target_layers=[2, 3], **options)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("selector", ["span", "v2drop", "random"])
def test_a_recurrent_target_serves_selectors_that_read_no_attention(selector, place):
    options = {"keep": 0.7, "min_keep": 3, "target_layers": [0, 2], "recycle": False, "selector": selector}
    run = build(PROMPTS["batch, unequal counts"], options, place, family="qwen3_5")
    check_generated(run, run.model.generate(**run.inputs, **GREEDY))


def test_fillers_of_rows_without_padding_that_keep_unequal_numbers(place):
    """transformers gives recurrent layers no mask then."""
    rows = [("image", 4, 4), ("text", 4)], [("image", 2, 4), ("text", 12)]
    # Behind the attention of layer 3 fillers are no zeros any more.
    run = build(rows, {**VARIANTS["random"], "target_layers": [1]}, place, family="qwen3_5")
    assert bool(run.inputs["attention_mask"].all())
    output = run.model.generate(**run.inputs, **GREEDY)
    assert len({sample.final_tokens for sample in run.state.report.samples}) == 2
    check_generated(run, output)


def test_the_report_says_what_recurrent_layers_hold():
    model, inputs = tiny_model("qwen3_5"), make_inputs(*PROMPTS["batch, left padding"], family="qwen3_5")
    state = apply_sparsevlm(model, keep=0.6, min_keep=3, target_layers=[1, 3])
    model.generate(**inputs, max_new_tokens=1)
    assert "recurrent layers: their states are as large" in state.report.kv_note
    assert 0 < state.report.kv_bytes.sparse < state.report.kv_bytes.dense


def test_later_images_of_a_batch_are_refused_before_anything_runs(place):
    run = build(PROMPTS["batch, same size"], VARIANTS["random"], place, family="qwen3_5")
    with pytest.raises(NotImplementedError, match=r"2 samples bring images on a kept cache.*one sample at a time"):
        take_second_turn(run, *IMAGE_TURNS)


def test_what_was_taken_in_cannot_be_cropped(place):
    run = build(PROMPTS["one image"], VARIANTS["random"], place, family="qwen3_5")
    with torch.no_grad():
        cache = run.model(**run.inputs, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-2)


def test_fillers_and_padding_are_not_taken_in():
    rows = torch.tensor([[-1, 0, 3], [1, 2, 3]])
    assert row_mask(None, rows, has_padding=False) is None
    assert row_mask(None, rows, has_padding=True).tolist() == [[False, True, True], [True, True, True]]
    given = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]])
    assert row_mask(given, rows, has_padding=True).tolist() == [[0, 1, 1], [0, 1, 1]]


def test_flops_of_a_recurrent_layer_are_those_of_its_weights_and_its_state():
    adapter = adapter_for(tiny_model("qwen3_5", n_layers=2))
    layer, n = adapter.decoder.layers[0], 10
    linear = sum(m.weight.numel() for m in layer.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv1d)))
    assert prefill_flops(adapter, [n, 0], 0) == n * (2 * linear + 6 * 4 * 8 * 8)
    assert prefill_flops(adapter, [n, 0], 100) == prefill_flops(adapter, [n, 0], 0)
