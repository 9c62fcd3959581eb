"""Layers with inputs of their own for every token, and layers that attend to keys and values of earlier ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from runs import GREEDY, OPTIONS, VARIANTS, all_dropped, build, check_generated, check_second_turn

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from sparsevlm.hooks import model_hooks, pruning
from sparsevlm.models import adapter_for
from sparsevlm.models.decoder import Decoder
from sparsevlm.request.costs import prefill_flops
from toys import IS_OLD, PROMPTS, make_inputs, relative_error, tiny_model

# As those of 26B and 31B, whose images see all of themselves in layers with a window.
LARGE = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"}
KINDS = {
    "with experts": {
        **LARGE, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1,
    },
    "dense": LARGE,
    "many shared": {"num_kv_shared_layers": 4, "use_double_wide_mlp": True},
}  # fmt: skip


@parametrize_pairs(
    kind=tuple(KINDS),
    variant=("by attention", "rank adaptive", "before the decoder"),
    prompt=("two images", "image and video", "batch, unequal counts"),
    attention=("sdpa", "eager"),
)
def test_other_sizes(kind, variant, prompt, attention, place):
    options = {"attention": attention, "family": "gemma4", "text_options": KINDS[kind], "noisy": True}
    run = build(PROMPTS[prompt], VARIANTS[variant], place, **options)
    check_generated(run, run.model.generate(**run.inputs, **GREEDY))


def error_of(run) -> float:
    """How far the first token's logits are from the reference."""
    output = run.model.generate(**run.inputs, **GREEDY)
    dropped = all_dropped(run.state.report, run.batch)
    logits = run.reference_logits(run.inputs, output.sequences[:, :-1], dropped)
    return relative_error(output.logits[0], logits[:, run.inputs["input_ids"].shape[1] - 1])


def one_row_off(monkeypatch):
    gathered = pruning.gathered_arguments

    def rolled(adapter, forward, hidden, args):
        hidden, own, *rest = gathered(adapter, forward, hidden, args)
        return (hidden, own.roll(1, dims=1), *rest)

    monkeypatch.setattr(model_hooks, "gathered_arguments", rolled)


def of_the_first_rows(monkeypatch):
    monkeypatch.setattr(
        model_hooks,
        "gathered_arguments",
        lambda adapter, forward, hidden, args: (hidden, args[1][:, : hidden.shape[1]], *args[2:]),
    )


@pytest.mark.parametrize("spoil", [one_row_off, of_the_first_rows])
def test_the_reference_tells_wrong_inputs_of_layers(spoil, place, monkeypatch):
    run = build(PROMPTS["two images"], VARIANTS["random"], place, family="gemma4")
    assert error_of(run) <= place.tolerance
    spoil(monkeypatch)
    assert error_of(build(PROMPTS["two images"], VARIANTS["random"], place, family="gemma4")) > 1e-3


def test_inputs_that_are_not_gathered_fail(place, monkeypatch):
    run = build(PROMPTS["one image"], VARIANTS["random"], place, family="gemma4")
    decoder = dataclasses.replace(run.state.adapter.decoder, per_token=())
    monkeypatch.setitem(vars(run.state.adapter), "decoder", decoder)
    with pytest.raises(RuntimeError, match="must match the size"):
        run.model.generate(**run.inputs, **GREEDY)


def test_layers_that_share_keys_have_no_cache_of_their_own(place, monkeypatch):
    monkeypatch.setattr(Decoder, "first_shared", 8)
    run = build(PROMPTS["batch, unequal counts"], VARIANTS["random"], place, family="gemma4")
    # What transformers puts there, by version: a layer that holds nothing, or none.
    with pytest.raises((NotImplementedError, IndexError), match=r"DummyLayer cannot hold|out of range"):
        run.model.generate(**run.inputs, **GREEDY)


def test_a_merged_token_has_the_inputs_of_its_place():
    model, inputs = tiny_model("gemma4"), make_inputs(*PROMPTS["one image"], family="gemma4")
    seen = []
    layer = model.model.language_model.layers[2]
    state = apply_sparsevlm(model, **{**OPTIONS, "recycle": True, "target_layers": [1]}, selector="sparsevlm")
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
        assert state.report.samples[0].stages[0].recycled
        positions = torch.tensor(state.report.logit_positions[0])
        state.detach()
        model(**inputs, use_cache=False)
    assert torch.equal(seen[0], seen[1][:, positions])


@parametrize_pairs(
    n_logits=(1, 3, 9, 200),
    prompt=("one image", "batch, unequal counts"),
    attention=("sdpa", "eager"),
    family=("gemma4", "gemma4_unified"),
    use_cache=(True, False),
)
def test_a_direct_call_gives_as_many_logits_as_asked_for(n_logits, prompt, attention, family, use_cache, place):
    """transformers itself computes no more rows behind the last layer with keys of its own."""
    run = build(PROMPTS[prompt], VARIANTS["random"], place, attention=attention, family=family)
    with torch.no_grad():
        whole = run.model(**run.inputs, use_cache=use_cache).logits
        last = run.model(**run.inputs, use_cache=use_cache, logits_to_keep=n_logits).logits
    positions = torch.tensor(run.state.report.logit_positions)
    wanted = whole[:, -n_logits:]
    assert last.shape == wanted.shape == (*positions.shape, 96)
    is_token = positions >= 0
    assert relative_error(last[is_token], wanted[is_token]) <= place.tolerance


def test_rows_are_cut_where_sharing_begins():
    model, inputs = tiny_model("gemma4"), make_inputs(*PROMPTS["one image"], family="gemma4")
    apply_sparsevlm(model, **OPTIONS)
    n_rows = []
    for layer in model.model.language_model.layers[5:7]:
        layer.register_forward_pre_hook(lambda module, args: n_rows.append(args[0].shape[1]))
    model.generate(**inputs, max_new_tokens=1)
    assert n_rows[0] > 7
    assert IS_OLD or n_rows[1] == 1
    output = model.generate(
        **inputs, max_new_tokens=1, output_hidden_states=True, output_logits=True, return_dict_in_generate=True
    )
    assert n_rows[3] == n_rows[2] == n_rows[0]  # as transformers does where they are asked for
    assert output.logits[0].shape == (1, 96)


def test_a_turn_of_text_goes_on_behind_a_pruned_prompt(place):
    run = build(PROMPTS["batch, unequal counts"], VARIANTS["by attention"], place, family="gemma4")
    check_second_turn(run, [("text", 6)])


def test_pruning_ends_before_the_layers_whose_keys_are_shared():
    model = tiny_model("gemma4")
    decoder = adapter_for(model).decoder
    assert decoder.key_layers == (0, 1, 2, 3, 4, 5, 4, 5)
    assert (decoder.first_shared, decoder.last_target, decoder.default_targets) == (6, 3, (1,))
    wanted = r"target_layers \[4\] are out of range.* after layers 0\.\.3\. Layers from 6 on .* of layers \[4, 5\]"
    with pytest.raises(ValueError, match=wanted):
        apply_sparsevlm(model, target_layers=[3, 4])
    assert adapter_for(tiny_model("gemma4", text_options=LARGE)).decoder.last_target == 4


def test_text_that_sees_what_is_behind_it_is_refused():
    model = tiny_model("gemma4", text_options={"use_bidirectional_attention": "all"})
    with pytest.raises(NotImplementedError, match="use_bidirectional_attention='all' lets every token see"):
        adapter_for(model)


def test_flops_are_those_of_the_rows_and_heads_of_each_layer():
    adapter = adapter_for(tiny_model("gemma4"))
    linear = [
        sum(module.weight.numel() for module in layer.modules() if isinstance(module, torch.nn.Linear))
        for layer in adapter.decoder.layers
    ]
    heads = [4 * 32 if kind == "full_attention" else 4 * 16 for kind in adapter.decoder.layer_types]
    n, n_last = 10, 2
    wanted = 0
    for layer in range(8):
        rows = range(n - n_last, n) if layer >= 6 else range(n)
        wanted += sum(2 * linear[layer] + 4 * heads[layer] * (row + 1) for row in rows)
    assert prefill_flops(adapter, [n] * 8, 0, n_last) == wanted
    everything = sum(2 * linear[layer] * n + 4 * heads[layer] * n * (n + 1) / 2 for layer in range(8))
    assert prefill_flops(adapter, [n] * 8, 0) == everything
