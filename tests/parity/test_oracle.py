"""Pruned runs equal a dense run in which the dropped tokens are hidden as keys from the following layer on."""

from __future__ import annotations

import flash_emulation
import pytest
import torch
from oracle import dropped_from, expand, oracle_logits

from sparsevlm import apply_sparsevlm
from sparsevlm.selection.scoring import top_k
from toys import IMAGE, PROMPTS, VIDEO, make_inputs, relative_error, tiny_model, use_attention

NEW_TOKENS = 5
ATTENTIONS = ("sdpa", "eager", flash_emulation.NAME)
GREEDY = {
    "max_new_tokens": NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": [IMAGE, VIDEO],  # the reference could not tell a generated placeholder from a real one
}
OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3], "recycle": False}


class FirstAndLast:
    """A selector before the decoder: every other token."""

    placement = "before_decoder"
    default_schedule = "single"

    def select(self, context, n_keep):
        return torch.randperm(context.n_visual, generator=torch.Generator().manual_seed(5))[:n_keep].sort().values


class BeforeAndInside:
    """A selector before the decoder and at target layers: at random, then by the attention of the last token."""

    placement = "both"
    needs = frozenset({"last_attention"})

    def select(self, context, n_keep):
        if context.layer < 0:
            assert context.last_attention is None
            return FirstAndLast().select(context, n_keep)
        return top_k(context.last_attention, n_keep)


VARIANTS = {
    "by attention": OPTIONS,
    "random": {**OPTIONS, "selector": "random"},
    "rank adaptive": {**OPTIONS, "keep": None, "rank_tolerance": 0.3},
    "before the decoder": {"keep": 0.5, "min_keep": 3, "selector": FirstAndLast()},
    "before and inside": {**OPTIONS, "keep": 0.5, "selector": BeforeAndInside()},
}


@pytest.fixture(params=ATTENTIONS)
def attn(request):
    flash_emulation.register()
    return request.param


@pytest.fixture
def build(place, attn):
    """Make the model and its inputs at the place of the test."""
    if place.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False

    def make(family, *rows, pad=True):
        model = tiny_model(family)
        use_attention(model, attn)
        inputs = make_inputs(*rows, pad=pad)
        return model.to(place.device, place.dtype), {name: value.to(place.device) for name, value in inputs.items()}

    return make


def reference(model, attn):
    """The oracle hands out 4D masks, which flash attention does not take."""
    if attn == flash_emulation.NAME:
        use_attention(model, "sdpa")


def assert_prunes(report):
    """The comparison only bites if something was dropped."""
    assert any(sample.final_tokens < sample.n_visual for sample in report.samples)


def check(model, inputs, output, state, attn, place, repeats=1):
    report = state.report
    assert_prunes(report)
    dropped = [dropped_from(report, b) for b in range(output.sequences.shape[0])]
    state.detach()
    reference(model, attn)
    expanded = expand(inputs, repeats) if repeats > 1 else inputs
    logits = oracle_logits(model, expanded, output.sequences[:, :-1], dropped)
    for step, got in enumerate(output.logits):
        wanted = logits[:, inputs["input_ids"].shape[1] - 1 + step]
        assert relative_error(got, wanted) <= place.tolerance, f"step {step}"
    dense = oracle_logits(model, expanded, output.sequences[:, :-1], [{} for _ in dropped])
    assert relative_error(output.logits[0], dense[:, inputs["input_ids"].shape[1] - 1]) > max(1e-3, place.tolerance)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy(prompt, variant, family, attn, build, place):
    model, inputs = build(family, *PROMPTS[prompt])
    if family == "qwen2_vl":
        inputs.pop("second_per_grid_ts", None)  # Qwen2-VL does not take it
    state = apply_sparsevlm(model, **VARIANTS[variant])
    output = model.generate(**inputs, **GREEDY)
    check(model, inputs, output, state, attn, place)


@pytest.mark.parametrize("prompt", ["one image", "batch, same size"])
def test_without_attention_mask(prompt, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt], pad=False)
    state = apply_sparsevlm(model, **OPTIONS)
    output = model.generate(**inputs, **GREEDY)
    check(model, inputs, output, state, attn, place)


@pytest.mark.parametrize("variant", ["by attention", "before the decoder", "before and inside"])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding"])
def test_sampling_several_sequences(prompt, variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    torch.manual_seed(3)
    output = model.generate(**inputs, **{**GREEDY, "do_sample": True, "num_return_sequences": 3})
    check(model, inputs, output, state, attn, place, repeats=3)


@pytest.mark.parametrize("variant", ["by attention", "before the decoder", "before and inside"])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding"])
def test_beams(prompt, variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    output = model.generate(**inputs, **GREEDY, num_beams=3, num_return_sequences=3, output_scores=True)
    report = state.report
    assert_prunes(report)
    state.detach()
    reference(model, attn)
    dropped = [dropped_from(report, b) for b in range(output.sequences.shape[0])]
    logits = oracle_logits(model, expand(inputs, 3), output.sequences[:, :-1], dropped)
    start = inputs["input_ids"].shape[1]
    for row in range(len(dropped)):
        wanted = logits[row, start - 1 :].double().log_softmax(-1).gather(1, output.sequences[row, start:, None])
        assert float(output.sequences_scores[row]) == pytest.approx(
            float(wanted.sum()) / NEW_TOKENS, rel=place.tolerance
        )


@pytest.mark.parametrize("variant", ["by attention", "before the decoder", "before and inside"])
def test_prompt_lookup(variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", [("text", 8), ("image", 4, 6), ("text", 9)])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, 2:6]  # something to look up: a guess from the first step on
    state = apply_sparsevlm(model, **VARIANTS[variant])
    plain = model.generate(**inputs, **GREEDY)
    without_guesses = state.report.samples[0].stages
    output = model.generate(**inputs, **{**GREEDY, "max_new_tokens": 12}, prompt_lookup_num_tokens=3)
    stages = state.report.samples[0].stages
    assert [stage.raters for stage in stages] == [stage.raters for stage in without_guesses]
    if place.dtype == torch.float32:  # in half precision a guess verified in a block may round to another token
        assert [stage.kept for stage in stages] == [stage.kept for stage in without_guesses]
        assert torch.equal(output.sequences[:, : plain.sequences.shape[1]], plain.sequences)
    check(model, inputs, output, state, attn, place)


@pytest.mark.parametrize("variant", ["by attention", "before the decoder", "before and inside"])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding", "batch, unequal counts"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"], indirect=True)
def test_static_cache(prompt, variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    output = model.generate(**inputs, **GREEDY, cache_implementation="static")
    assert "static" in state.report.kv_note
    check(model, inputs, output, state, attn, place)


@pytest.mark.parametrize("variant", ["random", "rank adaptive", "before the decoder", "before and inside"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"], indirect=True)
def test_static_cache_of_rows_without_padding_that_keep_unequal_numbers(variant, attn, build, place):
    """SDPA is given no mask for the prompt then, but needs one as soon as the rows differ."""
    model, inputs = build("qwen2_5_vl", [("image", 4, 4), ("text", 4)], [("image", 2, 4), ("text", 12)])
    assert bool(inputs["attention_mask"].all())
    state = apply_sparsevlm(model, **VARIANTS[variant])
    dynamic = model.generate(**inputs, **GREEDY)
    output = model.generate(**inputs, **GREEDY, cache_implementation="static")
    assert len({sample.final_tokens for sample in state.report.samples}) == 2
    assert torch.equal(output.sequences, dynamic.sequences)
    check(model, inputs, output, state, attn, place)


def test_static_cache_where_the_rank_decides():
    model = tiny_model()
    inputs = make_inputs([("image", 6, 6), ("text", 6)], [("image", 6, 6), ("text", 6)])
    state = apply_sparsevlm(model, min_keep=3, rank_tolerance=0.02)
    dynamic = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    assert len({sample.final_tokens for sample in state.report.samples}) == 2  # by the rank
    static = model.generate(**inputs, max_new_tokens=NEW_TOKENS, cache_implementation="static")
    assert torch.equal(static, dynamic)


@pytest.mark.parametrize("variant", ["random", "before the decoder"])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding"])
def test_without_cache(prompt, variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    output = model.generate(**inputs, **GREEDY, use_cache=False)
    check(model, inputs, output, state, attn, place)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_direct_call(prompt, variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    with torch.no_grad():
        got = model(**inputs).logits
    report = state.report
    assert_prunes(report)
    state.detach()
    reference(model, attn)
    dropped = [dropped_from(report, b) for b in range(got.shape[0])]
    wanted = oracle_logits(model, inputs, inputs["input_ids"], dropped)
    for b, positions in enumerate(report.logit_positions):
        rows = [i for i, position in enumerate(positions) if position >= 0]
        assert len(positions) == got.shape[1]
        assert relative_error(got[b, rows], wanted[b, [positions[i] for i in rows]]) <= place.tolerance


@pytest.mark.parametrize("variant", ["random", "by attention", "before the decoder", "before and inside"])
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "new image"])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding"])
def test_second_turn(prompt, new_image, variant, attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    first = model.generate(**inputs, **GREEDY)
    dropped = [dropped_from(state.report, b) for b in range(first.sequences.shape[0])]
    row = [("text", 2), ("image", 4, 5), ("text", 4)] if new_image else [("text", 6)]
    turn = make_inputs(*[row] * first.sequences.shape[0], seed=9)
    turn = {name: value.to(place.device) for name, value in turn.items()}
    n_first, past_len = first.sequences.shape[1], first.past_key_values.get_seq_length()
    assert past_len == n_first - 1
    second = dict(turn)
    for name, value in (("input_ids", 0), ("mm_token_type_ids", 0), ("attention_mask", 1)):
        before = (
            first.sequences
            if name == "input_ids"
            else torch.nn.functional.pad(inputs[name], (0, NEW_TOKENS), value=value)
        )
        second[name] = torch.cat([before, turn[name]], dim=1)
    if new_image:  # transformers takes a new image on a kept cache in no other way than with linear positions
        del second["mm_token_type_ids"]
    output = model.generate(**second, **GREEDY, past_key_values=first.past_key_values)
    handle.remove()
    if new_image:
        assert_prunes(state.report)
        for b, sample_dropped in enumerate(dropped):
            found = dropped_from(state.report, b)
            sample_dropped |= {position + past_len: layer for position, layer in found.items()}
    state.detach()
    reference(model, attn)
    batch = first.sequences.shape[0]
    positions = torch.cat([p[-3:].expand(3, batch, -1) for p in seen], dim=-1)
    both = dict(second)
    for name in ("pixel_values", "image_grid_thw"):
        both[name] = interleaved(inputs, turn, name, batch) if new_image else inputs[name]
    logits = oracle_logits(model, both, output.sequences[:, :-1], dropped, positions)
    start = second["input_ids"].shape[1] - 1
    for step, got in enumerate(output.logits):
        assert relative_error(got, logits[:, start + step]) <= place.tolerance, f"step {step}"


def interleaved(first, second, name, batch):
    """Pixels in the order of the merged prompt: first turn's, then second turn's image of every sample."""
    a, b = (x[name].split(x[name].shape[0] // batch) for x in (first, second))
    return torch.cat([part for pair in zip(a, b, strict=True) for part in pair])


def test_hidden_states_come_ragged(attn, build, place):
    model, inputs = build("qwen2_5_vl", *PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    n_other = state.report.samples[0].n_text
    lengths = [hidden.shape[1] - n_other for hidden in output.hidden_states[1:-1]]
    assert lengths == list(state.report.samples[0].layer_tokens[:-1])


@pytest.mark.parametrize("variant", ["by attention", "before the decoder", "before and inside"])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding", "batch, unequal counts"])
def test_going_on_with_the_cache_of_a_direct_call(prompt, variant, attn, build, place):
    """The text model makes that cache itself, after the call has begun."""
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    state = apply_sparsevlm(model, **VARIANTS[variant])
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    token = torch.full((inputs["input_ids"].shape[0], 1), 7, device=place.device)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        dropped = [dropped_from(state.report, b) for b in range(len(token))]
        held = sum(layer.keys.numel() * layer.keys.element_size() * 2 for layer in cache.layers)
        assert state.report.kv_bytes.sparse == held < state.report.kv_bytes.dense
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        handle.remove()
        positions = torch.cat([seen[0][-3:], seen[0][-3:, :, -1:] + 1], dim=-1)
        step = {"attention_mask": mask, "position_ids": positions[..., -1:], "past_key_values": cache}
        got = model(input_ids=token, **step).logits[:, -1]
    state.detach()
    reference(model, attn)
    sequences = torch.cat([inputs["input_ids"], token], dim=1)
    wanted = oracle_logits(model, inputs, sequences, dropped, positions)[:, -1]
    assert relative_error(got, wanted) <= place.tolerance


TURNS = {
    "prunes later than before": ({"target_layers": [1, 3]}, {"target_layers": [2]}),
    "reads later than before": ({"target_layers": [1, 3]}, {"target_layers": [3]}),
    "between": ({"target_layers": [1, 3]}, {"target_layers": [0, 2, 4]}),
    "after one before the decoder": ({"selector": FirstAndLast(), "target_layers": None}, {"target_layers": [1, 3]}),
    "then before the decoder": ({"target_layers": [1, 3]}, {"selector": FirstAndLast(), "target_layers": None}),
    "after one everywhere": ({"selector": BeforeAndInside()}, {"target_layers": [1, 3]}),
    "then everywhere": ({"target_layers": [1, 3]}, {"selector": BeforeAndInside(), "target_layers": [2]}),
    "dense in between": ({"target_layers": [1, 3]}, {"target_layers": [1, 3], "keep": 1.0}),
}


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding"])
@pytest.mark.parametrize("selector", ["sparsevlm", "random"])
def test_second_turn_under_other_options(turns, prompt, selector, attn, build, place):
    """Layers of one earlier stage can end up in different stages of the next turn."""
    model, inputs = build("qwen2_5_vl", *PROMPTS[prompt])
    before, after = ({**OPTIONS, "keep": 0.7, "selector": selector, **changes} for changes in TURNS[turns])
    state = apply_sparsevlm(model, **before)
    first = model.generate(**inputs, **GREEDY)
    batch, past_len = first.sequences.shape[0], first.past_key_values.get_seq_length()
    dropped = [dropped_from(state.report, b) for b in range(batch)]
    turn = make_inputs(*[[("text", 2), ("image", 4, 5), ("text", 4)]] * batch, seed=9)
    turn = {name: value.to(place.device) for name, value in turn.items()}
    second = {
        "input_ids": torch.cat([first.sequences, turn["input_ids"]], dim=1),
        "attention_mask": torch.cat(
            [torch.nn.functional.pad(inputs["attention_mask"], (0, NEW_TOKENS), value=1), turn["attention_mask"]], dim=1
        ),
        "pixel_values": turn["pixel_values"],
        "image_grid_thw": turn["image_grid_thw"],
    }
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    state = apply_sparsevlm(model, **after)
    output = model.generate(**second, **GREEDY, past_key_values=first.past_key_values)
    handle.remove()
    for b, sample_dropped in enumerate(dropped):
        sample_dropped |= {p + past_len: layer for p, layer in dropped_from(state.report, b).items()}
    for layer in output.past_key_values.layers:
        if getattr(layer, "table", None) is not None:
            assert layer.table.slots(layer.table.appended).shape[1] == layer.keys.shape[-2]
    state.detach()
    reference(model, attn)
    with torch.no_grad():
        model.model.rope_deltas = None
        found = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )[0]  # fmt: skip
    new = torch.cat([p[-3:].expand(3, batch, -1) for p in seen], dim=-1)
    between = new[..., :1] - torch.arange(NEW_TOKENS - 1, 0, -1, device=new.device)
    positions = torch.cat([found, between, new], dim=-1)
    both = {**second, "pixel_values": interleaved(inputs, turn, "pixel_values", batch)}
    both["image_grid_thw"] = interleaved(inputs, turn, "image_grid_thw", batch)
    logits = oracle_logits(model, both, output.sequences[:, :-1], dropped, positions)
    start = second["input_ids"].shape[1] - 1
    for step, got in enumerate(output.logits):
        assert relative_error(got, logits[:, start + step]) <= place.tolerance, f"step {step}"
