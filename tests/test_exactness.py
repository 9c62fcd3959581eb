"""With nothing pruned, and after removal, the model is the untouched one, bit for bit."""

from __future__ import annotations

import pytest
import torch

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.selection.selectors import SELECTORS
from toys import FAMILIES, PROMPTS, make_inputs, tiny_model, use_attention

SIXTEEN = {"max_new_tokens": 17, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
SIX = {**SIXTEEN, "max_new_tokens": 7}  # of every family: behind a few steps all are alike


def same(a, b):
    return torch.equal(a.sequences, b.sequences) and all(
        torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True)
    )


CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False}}


@parametrize_pairs(prompt=list(PROMPTS), cache=list(CACHES), attn=["sdpa", "eager"])
def test_nothing_pruned_is_bit_equal(prompt, attn, cache):
    model, inputs, options = tiny_model(attn=attn), make_inputs(*PROMPTS[prompt]), CACHES[cache]
    dense = model.generate(**inputs, **SIXTEEN, **options)
    state = apply_sparsevlm(model, keep=1.0, min_keep=2)
    assert same(model.generate(**inputs, **SIXTEEN, **options), dense)
    reasons = {stage.skipped_because for sample in state.report.samples for stage in sample.stages}
    counts = {sample.n_visual for sample in state.report.samples}
    kept = {f"the budget keeps all {n} visual tokens that have come this far" for n in counts}
    assert reasons <= {*kept, "no image or video in this sample"}
    assert state.report.kv_bytes.ratio == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_removal_gives_the_untouched_model_back(dtype):
    model, inputs = tiny_model().to(dtype), make_inputs(*PROMPTS["two images"])
    before = dict(model.__dict__)
    dense = model.generate(**inputs, **SIXTEEN)
    for _ in range(2):  # applying twice re-applies
        apply_sparsevlm(model, keep=0.6, min_keep=4)
    sparse = model.generate(**inputs, **SIXTEEN)
    assert not same(sparse, dense)
    remove_sparsevlm(model)
    assert same(model.generate(**inputs, **SIXTEEN), dense)
    assert set(model.__dict__) == set(before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@parametrize_pairs(
    family=list(FAMILIES), prompt=["one image", "two images", "batch, unequal counts"], attn=["sdpa", "eager"]
)
def test_every_family_is_bit_equal_with_nothing_pruned_and_after_removal(family, prompt, attn):
    model, inputs = tiny_model(family, attn=attn), make_inputs(*PROMPTS[prompt], family=family)
    dense = model.generate(**inputs, **SIX)
    apply_sparsevlm(model, keep=1.0, min_keep=2, target_layers=[0, 1, 3])
    assert same(model.generate(**inputs, **SIX), dense)
    state = apply_sparsevlm(model, keep=0.5, min_keep=3, target_layers=[0, 3])
    assert not same(model.generate(**inputs, **SIX), dense)
    assert state.report.final_tokens < state.report.n_visual
    remove_sparsevlm(model)
    assert not state.attached
    assert same(model.generate(**inputs, **SIX), dense)


def test_context_manager_removes():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    dense = model.generate(**inputs, **SIXTEEN)
    with apply_sparsevlm(model, keep=0.6, min_keep=4) as state:
        model.generate(**inputs, **SIXTEEN)
        assert state.report.final_tokens < 24
    assert same(model.generate(**inputs, **SIXTEEN), dense)
    remove_sparsevlm(model)  # harmless


def test_state_dict_is_untouched(tmp_path):
    model = tiny_model()
    keys = set(model.state_dict())
    apply_sparsevlm(model, keep=0.6, min_keep=4)
    model.generate(**make_inputs(*PROMPTS["one image"]), **SIXTEEN)
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_two_models_do_not_touch_each_other():
    first, second = tiny_model(), tiny_model(family="qwen2_vl", seed=1)
    inputs = make_inputs(*PROMPTS["one image"])
    dense = second.generate(**inputs, **SIXTEEN)
    state = apply_sparsevlm(first, keep=0.6, min_keep=4)
    first.generate(**inputs, **SIXTEEN)
    assert same(second.generate(**inputs, **SIXTEEN), dense)
    other = apply_sparsevlm(second, keep=0.8, min_keep=4)
    second.generate(**inputs, **SIXTEEN)
    first.generate(**inputs, **SIXTEEN)
    assert state.report.average_in < other.report.average_in
    remove_sparsevlm(first)
    assert other.attached
    assert not state.attached


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", ["one image", "two images", "batch, unequal counts"])
@pytest.mark.parametrize("recycle", [True, False])
def test_a_sample_alone_and_in_a_batch_keeps_the_same(prompt, attn, recycle):
    """Padding, fillers and neighbours must not change a choice, unless two scores are nearer than float32 rounding."""
    model = tiny_model(attn=attn)
    rows = [*PROMPTS[prompt][:1], [("text", 15), ("image", 6, 6), ("text", 4)]]
    state = apply_sparsevlm(model, keep=0.6, min_keep=4, target_layers=[1, 3], recycle=recycle)
    model.generate(**make_inputs(rows[0]), max_new_tokens=1)
    alone = state.report.samples[0].stages
    inputs = make_inputs(*rows)
    model.generate(**inputs, max_new_tokens=1)
    batched = state.report.samples[0].stages
    assert [(stage.kept, stage.recycled) for stage in alone] == [(stage.kept, stage.recycled) for stage in batched]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_keeps_what_float32_keeps_mostly(dtype):
    inputs = make_inputs(*PROMPTS["two images"])
    kept = []
    for kind in (torch.float32, dtype):
        model = tiny_model().to(kind)
        state = apply_sparsevlm(model, keep=0.6, min_keep=4, target_layers=[1, 3])
        model.generate(**inputs, max_new_tokens=2)
        kept.append(set(state.report.samples[0].stages[0].kept))
    assert len(kept[0] & kept[1]) >= 0.8 * len(kept[0])


def test_two_runs_choose_the_same():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    state = apply_sparsevlm(model, min_keep=4)
    reports = []
    for _ in range(2):
        model.generate(**inputs, max_new_tokens=2)
        reports.append(state.report.samples)
    assert reports[0] == reports[1]


def test_generated_placeholders_are_not_taken_for_visual_tokens():
    """A model can generate image ids itself; only a forward that brings pixels has visual tokens."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] += 50 * model.lm_head.weight.abs().mean()
    state = apply_sparsevlm(model, keep=0.6, min_keep=4)
    output = model.generate(
        **inputs, max_new_tokens=6, sequence_bias={(model.config.image_token_id,): 100.0}, do_sample=False
    )
    assert int((output[0, -6:] == model.config.image_token_id).sum()) == 6
    assert state.report.samples[0].n_visual == 24
    assert state.report.decode_steps == 5


def test_eager_is_what_sdpa_is():
    inputs, outputs = make_inputs(*PROMPTS["batch, unequal counts"]), []
    for attn in ("sdpa", "eager"):
        model = tiny_model()
        use_attention(model, attn)
        apply_sparsevlm(model, keep=0.6, min_keep=4)
        outputs.append(model.generate(**inputs, **SIXTEEN).logits[-1])
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_the_default_device_does_not_matter(selector):
    """A tensor that is made where torch puts new ones would fail here. (The tower of Qwen2.5-VL itself makes some.)"""
    model = tiny_model("qwen2_vl")
    inputs = make_inputs(*PROMPTS["batch, unequal counts"])
    apply_sparsevlm(model, keep=0.7, min_keep=3, selector=selector)
    wanted = model.generate(**inputs, max_new_tokens=3)
    with torch.device("meta"):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), wanted)
