"""The public calls: what they accept, what they say, what they leave behind."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLForConditionalGeneration,
)

from sparsevlm import Selection, SparseVLMConfig, apply_sparsevlm, remove_sparsevlm, reset_n_vis
from sparsevlm.report import Report
from sparsevlm.selection.context import NEEDS
from sparsevlm.selection.selectors.grid import GridSelector
from sparsevlm.template import Template
from toys import PAD, PROMPTS, make_inputs, tiny_model

ONE = PROMPTS["one image"]


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_the_spec_snippet():
    model, inputs = tiny_model().half(), make_inputs(*ONE)
    state = apply_sparsevlm(model, n_vis=256)
    reset_n_vis(state, n_vis=256)
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_wrong_n_vis_is_warned_about_once(caplog):
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, n_vis=256, min_keep=4)
    with caplog.at_level(logging.WARNING):
        model.generate(**inputs, max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2)
    assert [record.message for record in caplog.records].count(
        "sparsevlm: n_vis=256 was expected, the inputs hold [24] visual tokens: these are used."
    ) == 1
    assert state.report.samples[0].n_visual == 24
    reset_n_vis(state, n_vis=24)
    assert state.config.n_vis == 24
    assert state.config.min_keep == 4


def messages(caplog):
    return [record.message for record in caplog.records]


def test_a_number_of_tokens_as_n_vis_is_told_to_be_no_budget(caplog):
    """The specification's second argument is n_vis."""
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, 8, min_keep=4)
    model.generate(**inputs, max_new_tokens=1)
    hint = "n_vis is no budget: to keep 8 tokens, pass keep=8."
    assert sum(hint in message for message in messages(caplog)) == 1
    apply_sparsevlm(model, 8, min_keep=4, keep=0.9)
    model.generate(**inputs, max_new_tokens=1)
    assert sum(hint in message for message in messages(caplog)) == 1
    assert sum("n_vis=8 was expected" in message for message in messages(caplog)) == 2
    with pytest.raises(TypeError, match=r"expected to have, got 0.25: for a budget pass keep=0.25"):
        apply_sparsevlm(model, 0.25)
    with pytest.raises(TypeError, match=r"got 64.0: for a budget pass keep=64\."):
        apply_sparsevlm(model, 64.0)


def test_a_number_of_tokens_below_min_keep_is_told_at_once(caplog):
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=2, min_keep=4)
    assert messages(caplog) == [
        "sparsevlm: keep=2 is less than min_keep=4, which no image is pruned below: the least possible will be used. "
        "To change that, raise keep or lower min_keep (keep=2 is a number of tokens; 2 % of them is keep=0.02) (said "
        "once; see the reports)."
    ]
    model.generate(**inputs, max_new_tokens=1)
    assert len(messages(caplog)) == 1
    assert "4.0 used, as min_keep=4 leaves 4" in state.report.samples[0].budget_clamped
    with state.options(selector="span"):
        model.generate(**inputs, max_new_tokens=1)
    assert "14.0 used, as layers 0..2 see all of them" in state.report.samples[0].budget_clamped
    with state.options(keep=20, min_keep=4):
        pass
    assert len(messages(caplog)) == 1
    state = apply_sparsevlm(model, keep=20, min_keep=4)
    with state.options(keep=[0.9, 3]):
        pass
    assert "keep=3 is less than min_keep=4" in messages(caplog)[-1]


def test_a_misspelt_option_is_told_the_nearest():
    model = tiny_model()
    with pytest.raises(
        TypeError, match=r"unknown option keep_ratio \(did you mean 'keep'\?\); the options are"
    ) as error:
        apply_sparsevlm(model, keep_ratio=0.5)
    for name in ("allow_untested", "config", "family", "processor", "warmup", "min_keep_per_image"):
        assert f" {name}," in str(error.value) or f" {name}." in str(error.value)
    with pytest.raises(TypeError, match=r"selctor \(did you mean 'selector'\?\)"):
        apply_sparsevlm(model, selctor="span")
    with pytest.raises(TypeError, match=r"procesor \(did you mean 'processor'\?\)"):
        apply_sparsevlm(model, procesor=None)
    with pytest.raises(ValueError, match=r"no selector 'divprun' \(did you mean 'divprune'\?\); there are cdpruner"):
        apply_sparsevlm(model, selector="divprun")
    with pytest.raises(ValueError, match=r"no selector 'zzz'; there are"):
        apply_sparsevlm(model, selector="zzz")
    state = apply_sparsevlm(model)
    with pytest.raises(TypeError, match=r"processor: of apply_sparsevlm alone"), state.options(processor=None):
        pass


@pytest.mark.parametrize("size", ["2GB", 2e9])
def test_the_image_cache_is_counted_in_bytes(size):
    with pytest.raises(TypeError, match=r"image_cache must be a whole number of bytes, such as 2 \* 1024\*\*3 .*, got"):
        SparseVLMConfig(image_cache=size)


def test_importing_patches_nothing():
    code = (
        "import sys; import transformers.modeling_utils as m; before = dict(m.ALL_ATTENTION_FUNCTIONS._global_mapping);"
        "loaded = 'triton' in sys.modules;"  # newer transformers load it where it is installed
        "import sparsevlm.api, sparsevlm.generate, sparsevlm.hooks.model_hooks;"
        "assert dict(m.ALL_ATTENTION_FUNCTIONS._global_mapping) == before;"
        "assert ('triton' in sys.modules) == loaded; assert 'sparsevlm.kernels.triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_apply_inside_a_grad_mode_and_use_outside(mode):
    model, inputs = tiny_model(), make_inputs(*ONE)
    with mode():
        state = apply_sparsevlm(model, keep=0.6, min_keep=4)
        inside = model.generate(**inputs, max_new_tokens=3)
    outside = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(inside, outside)
    logits = model(**inputs).logits  # with grad
    logits.sum().backward()
    assert state.report.final_tokens < 24


def test_options_override_and_end():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, same size"])
    state = apply_sparsevlm(model, keep=0.9, min_keep=2, target_layers=[1, 3])
    with state.options(keep=[0.5, 1.0], selector="random"):
        model.generate(**inputs, max_new_tokens=2)
        first, second = state.report.samples
        assert first.average_in <= 12
        assert second.average_in == 24
        assert state.report.selector == "random"
        with state.options(target_layers=[0]):
            model.generate(**inputs, max_new_tokens=2)
            assert [stage.layer for stage in state.report.samples[0].stages] == [0]
        model.generate(**inputs, max_new_tokens=2, num_beams=2)  # one budget per sample, repeated for its beams
        assert [sample.average_in == 24 for sample in state.report.samples] == [False, False, True, True]
    model.generate(**inputs, max_new_tokens=2)
    assert state.report.selector == "span"
    with pytest.raises(TypeError, match="unknown option kep"), state.options(kep=0.5):
        pass
    with pytest.raises(ValueError, match="3 budgets for a batch of 2"), state.options(keep=[0.5, 0.5, 0.5]):
        model.generate(**inputs, max_new_tokens=2)


def test_config_object_or_options_not_both():
    model = tiny_model()
    config = SparseVLMConfig(keep=0.6, min_keep=4)
    assert apply_sparsevlm(model, config=config).config == config
    with pytest.raises(ValueError, match=r"got selector"):
        apply_sparsevlm(model, config=config, selector="span")
    with pytest.raises(ValueError, match=r"not both \(got keep\)"):
        apply_sparsevlm(model, keep=0.5, config=config)


BAD_OPTIONS = {
    "target layer out of range": ({"target_layers": [2, 5]}, ValueError, r"\[5\] are out of range.*0\.\.4"),
    "negative target layer": ({"target_layers": [-1]}, ValueError, "target_layers must be at least 0"),
    "target layer twice": ({"target_layers": [2, 2]}, ValueError, "holds a layer twice"),
    "no target layer": ({"target_layers": []}, ValueError, "non-empty"),
    "tau": ({"tau": 1.5}, ValueError, r"tau must be in \[0, 1\]"),
    "theta": ({"theta": -0.1}, ValueError, r"theta must be in \[0, 1\]"),
    "theta nan": ({"theta": float("nan")}, ValueError, r"theta must be in \[0, 1\]"),
    "infeasible keep": ({"keep": 0.1, "selector": "span"}, ValueError, r"Feasible: keep in \(0\.500, 1\.0\]"),
    "infeasible keep in a list": ({"keep": [0.9, 0.1], "selector": "span"}, ValueError, "Feasible"),
    "infeasible keep in tokens": ({"keep": 20, "n_vis": 256, "selector": "span"}, ValueError, "Feasible"),
    "negative keep": ({"keep": -0.5}, ValueError, r"must be in \(0, 1\]"),
    "keep above one": ({"keep": 1.5}, ValueError, "for a number of tokens pass an int"),
    "zero tokens": ({"keep": 0}, ValueError, "at least 1"),
    "keep as text": ({"keep": "0.5"}, TypeError, "keep must be"),
    "min_keep": ({"min_keep": 0}, ValueError, "min_keep must be at least 1"),
    "schedule name": ({"keep": 0.7, "schedule": "linear"}, ValueError, "'geometric', 'single'"),
    "schedule length": ({"schedule": [10, 5]}, ValueError, "2 counts for 1 target layers"),
    "growing schedule": ({"schedule": [5, 10], "target_layers": [1, 2]}, ValueError, "grows"),
    "schedule and keep": ({"schedule": [5], "keep": 0.9}, ValueError, "itself a budget"),
    "unknown selector": ({"selector": "fastw"}, ValueError, "there are .*grid, .*random, .*sparsevlm"),
    "no selector": ({"selector": 3}, TypeError, r"select\(context, n_keep\)"),
    "negative seed": ({"seed": -1}, ValueError, "seed must be at least 0"),
    "huge seed": ({"seed": 2**63}, ValueError, "seed must be at most 9223372036854775807, got 9223372036854775808"),
    "a class": ({"selector": GridSelector}, TypeError, r"not the class .* itself: pass selector=GridSelector\(\)"),
    "unknown raters": ({"raters": "some"}, ValueError, "'attention', 'embedding'"),
    "unknown heads": ({"heads": "some"}, ValueError, "'all', 'visual'"),
    "unknown merge": ({"merge": "max"}, ValueError, "'mean', 'sum'"),
    "unknown option": ({"kep": 0.5}, TypeError, "unknown option kep"),
    "preset needs deeper": ({"preset": "paper-192"}, ValueError, "out of range"),
    "rank tolerance": ({"rank_tolerance": 1.0}, ValueError, "rank_tolerance"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_raise_and_leave_nothing_behind(case):
    options, error, message = BAD_OPTIONS[case]
    model = tiny_model()
    with pytest.raises(error, match=message):
        apply_sparsevlm(model, **options)
    assert hooks(model) == 0


def test_a_failed_re_apply_keeps_the_old_state():
    model = tiny_model()
    state = apply_sparsevlm(model, keep=0.7, min_keep=4)
    with pytest.raises(ValueError, match="Feasible"):
        apply_sparsevlm(model, keep=0.1, selector="span")
    assert state.attached
    remove_sparsevlm(model)


def test_text_only_model():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(NotImplementedError, match="text-only model has no visual tokens"):
        apply_sparsevlm(LlamaForCausalLM(config))


def test_unsupported_objects():
    with pytest.raises(TypeError, match="expected a transformers model, got str"):
        apply_sparsevlm("Qwen/Qwen2.5-VL-7B-Instruct")
    with pytest.raises(NotImplementedError, match=r"Supported are .*LlavaForConditionalGeneration, .*Qwen2VLFor"):
        apply_sparsevlm(torch.nn.Linear(2, 2))


def test_checkpoint_of_the_other_family_names_the_right_class(tmp_path):
    tiny_model("qwen2_5_vl").save_pretrained(tmp_path)
    wrong = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=r"Load it with transformers\.Qwen2_5_VLForConditionalGeneration"):
        apply_sparsevlm(wrong)


class Answering:
    """A selector that answers whatever the test says."""

    def __init__(self, answer):
        self.answer = answer

    def select(self, context, n_keep):
        return self.answer(context, n_keep)


def scores_with_nan(context, n_keep):
    from sparsevlm.selection.scoring import top_k

    return top_k(torch.full((context.n_visual,), torch.nan), n_keep)


BAD_ANSWERS = {
    "duplicates": (lambda c, n: torch.zeros(n, dtype=torch.long), "duplicate"),
    "unsorted": (lambda c, n: torch.arange(n).flip(0), "unsorted"),
    "too few": (lambda c, n: torch.arange(n - 1), "expected"),
    "out of range": (lambda c, n: torch.arange(n) + c.n_visual, "outside"),
    "negative": (lambda c, n: torch.arange(n) - 1, "outside"),
    "NaN scores": (scores_with_nan, "NaN"),
    "merge without weights": (
        lambda c, n: Selection(torch.arange(n), merge_target=torch.arange(c.n_visual)),
        "go together",
    ),
    "merge into a dropped row": (
        lambda c, n: Selection(torch.arange(n), torch.arange(c.n_visual), torch.ones(c.n_visual)),
        "merge_target",
    ),
    "NaN weights": (
        lambda c, n: Selection(
            torch.arange(n), torch.arange(c.n_visual).clamp_max(n - 1), torch.full((c.n_visual,), torch.nan)
        ),
        "NaN or infinite weights",
    ),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_bad_selectors_are_named_and_the_model_stays_usable(case):
    answer, message = BAD_ANSWERS[case]
    model, inputs = tiny_model(), make_inputs(*ONE)
    dense = model.generate(**inputs, max_new_tokens=3)
    apply_sparsevlm(model, keep=0.6, min_keep=4, selector=Answering(answer), target_layers=[1])
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=3)
    remove_sparsevlm(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), dense)


@pytest.mark.parametrize(
    "options",
    [
        {"selector": "span"},
        {"selector": "span", "raters": "embedding"},
        {"selector": "sparsevlm-paper"},
        {"selector": "grid", "keep": 0.6},
        {"selector": "random", "keep": 0.6},
    ],
    ids=str,
)
def test_nan_inside_the_model_is_told(options):
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    apply_sparsevlm(model, min_keep=3, **options)
    with pytest.raises(ValueError, match="hold NaN or infinity; check the model's inputs and dtype"):
        model.generate(**make_inputs(*ONE), max_new_tokens=1)


def test_selector_that_returns_no_indices():
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, keep=0.6, min_keep=4, selector=Answering(lambda c, n: [1, 2]), target_layers=[1])
    with pytest.raises(TypeError, match="must return a Selection or a tensor"):
        model.generate(**inputs, max_new_tokens=3)


def test_selector_with_unknown_needs():
    selector = Answering(lambda c, n: torch.arange(n))
    selector.needs = {"vision_values"}
    with pytest.raises(ValueError, match="vision_values, which is not provided; provided are features, text_features"):
        apply_sparsevlm(tiny_model(), selector=selector)
    selector.needs, selector.placement = {"rater_attention", "last_attention", "vision_keys"}, "before_decoder"
    with pytest.raises(ValueError, match="before the decoder, where last_attention, rater_attention do not exist"):
        apply_sparsevlm(tiny_model(), selector=selector, keep=0.5)
    for needs, placement in (({"vision_attention", "vision_keys"}, "before_decoder"), (NEEDS, "both")):
        selector.needs, selector.placement = needs, placement
        apply_sparsevlm(tiny_model(), selector=selector, keep=0.5)
    selector.placement = "everywhere"
    with pytest.raises(ValueError, match=r"placement must be one of \('before_decoder', 'target_layers', 'both'\)"):
        apply_sparsevlm(tiny_model(), selector=selector, keep=0.5)


@pytest.mark.parametrize("needs", [None, 3, "features", [3, "features"]], ids=str)
def test_needs_are_a_collection_of_names(needs):
    selector = Answering(lambda c, n: torch.arange(n))
    selector.needs = needs
    with pytest.raises(
        TypeError, match=r"'Answering': needs must be a collection of names, such as \{'features'\}, got"
    ):
        apply_sparsevlm(tiny_model(), selector=selector)


def test_what_a_selector_writes_into_its_context_changes_nothing():
    def tidy(context, n_keep):
        return torch.arange(n_keep)

    def messy(context, n_keep):
        for value in vars(context).values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        return torch.arange(n_keep)

    told = []
    for answer in (tidy, messy):
        selector = Answering(answer)
        selector.needs = NEEDS
        model, inputs = tiny_model(), make_inputs(*ONE)
        state = apply_sparsevlm(model, keep=0.6, min_keep=4, selector=selector, target_layers=[1, 3])
        sequence = model.generate(**inputs, max_new_tokens=4)
        told.append((sequence.tolist(), [stage.kept for stage in state.report.samples[0].stages]))
    assert told[0] == told[1]


def test_every_need_is_provided():
    seen = {}

    def answer(context, n_keep):
        seen[context.layer] = context
        return torch.arange(n_keep)

    selector = Answering(answer)
    selector.needs = NEEDS
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=0.6, min_keep=4, selector=selector, target_layers=[1, 3])
    hidden = model.generate(
        **inputs, max_new_tokens=1, output_hidden_states=True, return_dict_in_generate=True
    ).hidden_states[0]
    visual = list(state.report.samples[0].visual_positions)
    first = seen[1]
    assert torch.equal(first.features, hidden[0][0, visual])
    assert torch.equal(first.previous_hidden_states, hidden[1][0, visual])
    assert torch.equal(first.text_features, hidden[0][0, [0, 1, 2, *range(-7, 0)]])
    assert first.last_attention.shape == (24,)
    assert first.vision_attention.shape == (2, 24)
    assert first.vision_keys.shape == (24, 16)
    assert first.rater_attention.shape == (len(state.report.samples[0].stages[0].raters), 24)
    assert first.coordinates.shape == (3, 24)
    assert first.coordinates[2, :6].diff().tolist() == [1] * 5
    assert torch.equal(seen[3].features, hidden[0][0, visual][seen[3].indices])
    assert torch.equal(seen[3].vision_attention, first.vision_attention[:, seen[3].indices])
    assert torch.equal(seen[3].vision_keys, first.vision_keys[seen[3].indices])
    assert seen[3].last_attention.shape == (seen[3].n_visual,)


def test_what_is_not_needed_is_not_given():
    seen = []

    def answer(context, n_keep):
        seen.append(context)
        return torch.arange(n_keep)

    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, keep=0.6, min_keep=4, selector=Answering(answer), target_layers=[1])
    model.generate(**inputs, max_new_tokens=1)
    assert all(getattr(seen[0], need) is None for need in NEEDS)


class Both(Answering):
    """Before the decoder and at target layers."""

    placement = "both"
    needs = frozenset({"rater_attention", "last_attention", "previous_hidden_states", "features"})


def first_rows(context, n_keep):
    late = (context.rater_attention, context.last_attention, context.previous_hidden_states)
    assert all((part is None) == (context.layer < 0) for part in late)
    assert context.features is not None
    return torch.arange(n_keep)


def test_before_the_decoder_and_inside_it(tmp_path):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, unequal counts"])
    state = apply_sparsevlm(model, keep=0.4, min_keep=3, selector=Both(first_rows), target_layers=[1, 3])
    model.generate(**inputs, max_new_tokens=2)
    report = state.report
    for sample in report.samples[:2]:
        assert [stage.layer for stage in sample.stages] == [-1, 1, 3]
        before, first, last = (stage.n_kept for stage in sample.stages)
        assert sample.n_visual > before > first > last == sample.final_tokens
        assert sample.layer_tokens == (before, before, first, first, last, last)
        assert sample.average_in <= 0.4 * sample.n_visual
    rows = report.layer_rows()
    assert [row["layer"] for row in rows if row["target"]] == [-1, 1, 3]
    assert rows[0]["kept"] == rows[1]["visual_in"]
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    with state.options(target_layers=None):  # the default ones: every 4th from layer 2
        model.generate(**inputs, max_new_tokens=1)
        assert [stage.layer for stage in state.report.samples[0].stages] == [-1, 2]


def test_an_explicit_schedule_before_the_decoder_and_inside_it():
    model, inputs = tiny_model(), make_inputs(*ONE)
    options = {"min_keep": 3, "selector": Both(first_rows), "target_layers": [1, 3]}
    state = apply_sparsevlm(model, schedule=[15, 9, 5], **options)
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.samples[0].layer_tokens == (15, 15, 9, 9, 5, 5)
    with pytest.raises(ValueError, match=r"2 counts for 3 target layers \(-1, 1, 3\) \(-1 is before the decoder\)"):
        apply_sparsevlm(model, schedule=[9, 5], **options)
    with pytest.raises(ValueError, match=r"3 counts for 2 target layers \(1, 3\)"):
        apply_sparsevlm(model, schedule=[15, 9, 5], **{**options, "selector": "random"})


@pytest.mark.parametrize("placement", ["both", "before_decoder"])
@pytest.mark.parametrize("schedule", [None, "single"])
def test_no_rank_before_the_decoder(placement, schedule):
    selector = Answering(first_rows)
    selector.placement = placement
    with pytest.raises(ValueError, match="before the decoder, where no rank is known: set keep"):
        apply_sparsevlm(tiny_model(), selector=selector, schedule=schedule)


def test_images_without_image_tokens():
    model, inputs = tiny_model(), make_inputs(*ONE)
    inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id] = 5
    apply_sparsevlm(model)
    with pytest.raises(ValueError, match="no image token"):
        model(**inputs)


def test_labels_are_refused():
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model)
    with pytest.raises(NotImplementedError, match="labels="):
        model(**inputs, labels=inputs["input_ids"])


def test_an_exception_inside_generate_restores_everything():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=0.6, min_keep=4, target_layers=[1, 3])
    wanted = model.generate(**inputs, max_new_tokens=4)
    configs = [attention.config for attention in state.adapter.decoder.attentions]

    def fail(module, args):
        raise RuntimeError("a layer failed")

    for place in (
        state.adapter.decoder.attentions[1].q_proj,
        state.adapter.decoder.attentions[1].o_proj,
        state.adapter.decoder.layers[3].mlp,
    ):
        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="a layer failed"):
            model.generate(**inputs, max_new_tokens=4)
        handle.remove()
        assert all(a.config is b for a, b in zip(state.adapter.decoder.attentions, configs, strict=True))
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)


def test_flex_attention_is_refused_with_the_remedy():
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model)
    model.model.language_model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(NotImplementedError, match=r"set_attn_implementation\('sdpa'\)"):
        model.generate(**inputs, max_new_tokens=2)


def test_chunked_prefill_is_refused_with_the_remedy():
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, keep=0.6, min_keep=4)
    with pytest.raises((NotImplementedError, ValueError), match="prefill"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


def test_quantized_and_unknown_caches_are_refused():
    from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, keep=0.6, min_keep=4)
    cache = DynamicCache()
    cache.layers.extend(DynamicSlidingWindowLayer(8) for _ in range(6))
    cache.layer_class_to_replicate = None
    with pytest.raises(NotImplementedError, match="DynamicSlidingWindowLayer cannot hold a pruned sequence"):
        model.generate(**inputs, max_new_tokens=2, past_key_values=cache)


def test_bare_dynamic_cache():
    from transformers.cache_utils import DynamicCache

    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=0.6, min_keep=4)
    wanted = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, past_key_values=DynamicCache()), wanted)
    assert state.report.kv_bytes.ratio < 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("turns", ["first", "refresh"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_its_old_and_its_new_name(name, turns, engine):
    from transformers.cache_utils import DynamicCache

    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, keep=0.6, min_keep=4, engine=engine, turns=turns)
    cache = DynamicCache(config=model.config)
    first = model.generate(**inputs, max_new_tokens=4, **{name: cache})
    assert cache.get_seq_length() == first.shape[1] - 1
    ids = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    second = model.generate(ids, max_new_tokens=4, **{name: cache})
    assert cache.get_seq_length() == second.shape[1] - 1 == ids.shape[1] + 3


def test_text_only_prompt_is_a_lawful_skip():
    model, inputs = tiny_model(), make_inputs([("text", 9)])
    dense = model.generate(**inputs, max_new_tokens=4)
    state = apply_sparsevlm(model, keep=0.6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), dense)
    assert state.report.skipped_because == "no image or video in the input"
    assert "nothing pruned" in str(state.report)


def test_few_visual_tokens_are_a_lawful_skip():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model)
    model.generate(**inputs, max_new_tokens=2)
    assert state.report.samples[0].stages[0].skipped_because == "24 visual tokens are not more than min_keep=32"


def test_clamped_budget_is_warned_about_reported_and_refused_when_strict(caplog):
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=0.6, min_keep=20)
    with caplog.at_level(logging.WARNING):
        model.generate(**inputs, max_new_tokens=2)
        model.generate(**inputs, max_new_tokens=2)
    assert len([record for record in caplog.records if "min_keep=20" in record.message]) == 1
    assert state.report.budget_clamped
    assert state.report.final_tokens == 20
    with state.options(strict=True), pytest.raises(ValueError, match="strict=True refuses"):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.7}, "keep=0.7"),
        ({"keep": [0.7, 12, 1.0]}, "keep=(0.7, 12, 1.0)"),
        ({}, "keep=None"),
        ({"schedule": [16, 12]}, "schedule=(16, 12)"),
        ({"schedule": [2 / 3, 1 / 3]}, "schedule=(0.6667, 0.3333)"),
        ({"keep": 0.7, "schedule": "single"}, "keep=0.7"),
    ],
    ids=["fraction", "one each", "rank", "counts", "fractions", "named schedule"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_report_says_the_budget_that_was_asked_for_and_the_dtype(options, said, dtype):
    model, inputs = tiny_model().to(getattr(torch, dtype)), make_inputs(*PROMPTS["batch, unequal counts"])
    state = apply_sparsevlm(model, min_keep=4, target_layers=[1, 3], **options)
    model.generate(**inputs, max_new_tokens=1)
    assert f": selector span, {said}, {dtype}, path plain (" in str(state.report)
    older = {key: value for key, value in state.report.to_dict().items() if key not in ("asked", "dtype")}
    assert ": selector span, path plain (" in str(Report.from_dict(older))


def test_a_report_names_the_preset_while_it_is_one():
    model, inputs = tiny_model(n_layers=18), make_inputs(*ONE)
    state = apply_sparsevlm(model, preset="paper-64")
    model.generate(**inputs, max_new_tokens=1)
    assert ": selector sparsevlm, preset=paper-64, float32, " in str(state.report)
    with state.options(min_keep=4):
        model.generate(**inputs, max_new_tokens=1)
    assert ", schedule=(0.1424, 0.0556, 0.0312), float32, " in str(state.report)


def test_a_state_that_another_replaced_says_whose_report_to_read():
    model, inputs = tiny_model(), make_inputs(*ONE)
    first, second = apply_sparsevlm(model, keep=0.5), apply_sparsevlm(model, keep=0.25)
    model.generate(**inputs, max_new_tokens=1)
    with pytest.raises(RuntimeError, match="no longer its own: read the report of what the last apply_sparsevlm"):
        first.report  # noqa: B018
    assert second.report.asked == "keep=0.25"


def test_report_tells_the_truth_and_travels(tmp_path):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, unequal counts"])
    state = apply_sparsevlm(model, keep=0.7, min_keep=4, target_layers=[1, 3])
    with pytest.raises(RuntimeError, match="no request yet"):
        state.report  # noqa: B018
    output = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    report = state.report
    held = sum(
        layer.keys[:, :, :-3].numel() * 4 + layer.values[:, :, :-3].numel() * 4
        for layer in output.past_key_values.layers
    )
    assert report.kv_bytes.sparse == held
    assert report.decode_steps == 3
    assert set(report.wall_ms) == {"vision", "prefill", "pruning", "decode"}
    assert 0 < report.flops.sparse < report.flops.dense
    assert report.samples[1].grids == ((1, 3, 4), (1, 4, 4))
    text = str(report)
    assert "visual tokens per sample" in text
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        Report.from_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="not a sparsevlm report"):
        Report.from_dict({"version": 99})
    total = sum([report, report])
    assert total.n_requests == 2
    assert total.kv_bytes.sparse == 2 * report.kv_bytes.sparse
    assert total.average_in == pytest.approx(report.average_in)


def test_which_text_voted():
    """Text after the last image only, without special tokens and without what closes the template."""
    model = tiny_model()
    inputs = make_inputs([("text", 4), ("image", 4, 6), ("text", 8)])
    suffix = tuple(inputs["input_ids"][0, -3:].tolist())
    state = apply_sparsevlm(model, selector="sparsevlm", keep=0.6, min_keep=4, target_layers=[1])
    state._session.template = Template(suffix=suffix)
    model.generate(**inputs, max_new_tokens=1)
    end = inputs["input_ids"].shape[1]
    raters = state.report.samples[0].stages[0].raters
    assert raters
    assert set(raters) <= set(range(end - 8, end - 3))


def test_text_features_are_of_all_the_text():
    """Before, between and after the images, in a batch with padding; without special tokens and the template's."""
    model = tiny_model()
    rows = [("text", 4), ("image", 4, 6), ("text", 5), ("image", 2, 3), ("text", 6)], [("image", 4, 6), ("text", 3)]
    inputs = make_inputs(*rows)
    first, second = (ids[ids != PAD].tolist() for ids in inputs["input_ids"])
    seen = {}

    def answer(context, n_keep):
        seen[context.sample] = context.text_features
        return torch.arange(n_keep)

    selector = Answering(answer)
    selector.needs = {"text_features"}
    state = apply_sparsevlm(model, keep=0.6, min_keep=4, selector=selector, target_layers=[1])
    embedding = model.get_input_embeddings()
    after = [*first[30:35], *first[43:]]
    for template, words in (
        (Template(), [first[:4] + after, second[26:]]),
        (Template(prefix=tuple(first[:3]), suffix=tuple(first[-2:])), [first[3:4] + after[:-2], second[26:]]),
        (Template(prefix=tuple(second[-3:]), suffix=tuple(second[-3:])), [first[:4] + after, second[-1:]]),
    ):
        state._session.template = template
        model.generate(**inputs, max_new_tokens=1)
        for b in range(2):
            assert torch.equal(seen[b], embedding(torch.tensor(words[b])))


@pytest.mark.parametrize("selector", ["cdpruner", "mmtok"])
def test_a_question_before_the_image_counts(selector):
    model = tiny_model()
    inputs = make_inputs([("text", 9), ("image", 6, 6), ("text", 2)])
    state = apply_sparsevlm(model, selector=selector, keep=0.6, min_keep=1)
    kept = set()
    for seed in range(3):
        inputs["input_ids"][0, :9] = torch.randint(1, 80, (9,), generator=torch.Generator().manual_seed(seed))
        model.generate(**inputs, max_new_tokens=1)
        kept.add(state.report.samples[0].stages[0].kept)
    assert len(kept) > 1


def test_without_text_after_the_image_the_last_token_votes():
    model, inputs = tiny_model(), make_inputs([("text", 4), ("image", 4, 6)])
    state = apply_sparsevlm(model, selector="sparsevlm", keep=0.6, min_keep=4, target_layers=[1])
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.samples[0].stages[0].raters == (inputs["input_ids"].shape[1] - 1,)


def test_embedding_raters_are_chosen_once():
    model, inputs = tiny_model(), make_inputs(*ONE)
    options = {"keep": 0.6, "min_keep": 4, "target_layers": [1, 3], "selector": "sparsevlm"}
    state = apply_sparsevlm(model, raters="embedding", **options)
    model.generate(**inputs, max_new_tokens=1)
    first, second = state.report.samples[0].stages
    assert first.raters == second.raters
    assert 0 < len(first.raters) <= 7


@pytest.mark.parametrize("engine", [False, True])
def test_floors_that_keep_all_are_no_pruning(engine):
    model, inputs = tiny_model(), make_inputs([("text", 4), ("image", 4, 6), ("image", 4, 6), ("text", 7)])
    state = apply_sparsevlm(model, min_keep=1, min_keep_per_image=24, engine=engine)
    model.generate(**inputs, max_new_tokens=1)
    assert "budget and floors keep every visual token here" in str(state.report)


TOLD = (("tau", "span"), ("theta", "fastv"))


def test_what_only_the_engine_reads_is_not_laid_to_the_selector_alone(caplog):
    with caplog.at_level(logging.WARNING):
        apply_sparsevlm(tiny_model(), keep=0.5, vision_keep=0.5, engine=False)
    assert "vision_keep: no effect under selector='span-features', engine=False and this budget." in caplog.text


def test_options_without_effect_are_warned_about_once(caplog):
    model, inputs = tiny_model(), make_inputs(*ONE)
    options = {"keep": 0.6, "min_keep": 4, "target_layers": [1]}
    with caplog.at_level(logging.WARNING):
        state = apply_sparsevlm(model, **options, tau=0.25)
        for _ in range(2):
            with state.options(selector="fastv"):  # tau was not given here
                model.generate(**inputs, max_new_tokens=1)
            with state.options(selector="fastv", theta=0.25):
                model.generate(**inputs, max_new_tokens=1)
        apply_sparsevlm(tiny_model(n_layers=18), preset="paper-64", selector="fastv")
    told = [record.message for record in caplog.records if "no effect" in record.message]
    assert told == [f"sparsevlm: {option}: no effect under selector={name!r} and this budget." for option, name in TOLD]


def test_all_that_may_vote_are_raters_on_request():
    model, inputs = tiny_model(), make_inputs(*ONE)
    options = {"keep": 0.6, "min_keep": 4, "target_layers": [1], "selector": "sparsevlm"}
    state = apply_sparsevlm(model, raters="all", **options)
    model.generate(**inputs, max_new_tokens=1)
    end = inputs["input_ids"].shape[1]
    assert state.report.samples[0].stages[0].raters == tuple(range(end - 7, end))


def test_inputs_embeds_with_pixels():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=0.6, min_keep=4, selector="random")
    with torch.no_grad():
        wanted = model(**{k: v for k, v in inputs.items() if k != "mm_token_type_ids"}).logits
        kept = state.report.samples[0].stages[0].kept
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs.pop("mm_token_type_ids")
        model.model.rope_deltas = None
        got = model(inputs_embeds=embeds, **inputs).logits
    assert state.report.samples[0].stages[0].kept == kept
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("direct", [False, True])
def test_embeddings_that_hold_images_already_are_warned_about_once(direct, engine, caplog):
    model, inputs = tiny_model(), make_inputs(*ONE)
    merged = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: merged.update(inputs_embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    merged["attention_mask"] = inputs["attention_mask"]

    def ask():
        model.model.rope_deltas = None
        with torch.no_grad():
            return model(**merged).logits if direct else model.generate(**merged, max_new_tokens=3)

    dense = ask()
    state = apply_sparsevlm(model, keep=0.6, min_keep=4, engine=engine)
    model.generate(**inputs, max_new_tokens=3)
    assert not caplog.records
    for _ in range(2):
        assert torch.equal(ask(), dense)
        assert "inputs_embeds without pixels" in state.report.skipped_because
    assert caplog.text.count("nothing is pruned, as they do not tell where") == 1


def test_packed_sequences_are_refused():
    model, inputs = tiny_model(), make_inputs(*ONE, pad=False)
    n = inputs["input_ids"].shape[1]
    apply_sparsevlm(model, keep=0.6, min_keep=4)
    positions = torch.cat([torch.arange(n - 5), torch.arange(5)]).expand(4, 1, -1)
    with pytest.raises(NotImplementedError, match="packed sequences"):
        model(**inputs, position_ids=positions)


def test_positional_arguments():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, keep=0.6, min_keep=4)
    with torch.no_grad():
        named = model(**inputs).logits
        rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"], **rest).logits, named)
    assert state.report.final_tokens < 24


def test_a_variant_sets_its_own_options_and_leaves_the_others_alone(model):
    """What "sparsevlm-paper" sets is in force for its requests only."""
    inputs = make_inputs([("image", 6, 6), ("text", 9)])
    state = apply_sparsevlm(model, selector="sparsevlm-paper", keep=0.6, min_keep=4, target_layers=[1])
    model(**inputs)
    assert state._session.request.config.raters == "embedding"
    with state.options(selector="sparsevlm"):
        model(**inputs)
        assert state._session.request.config.raters == "attention"
    assert state.config.raters == "attention"


def test_a_prompt_that_ends_in_a_visual_token_is_refused(model):
    """Its last row predicts the next token, so it must not be dropped; with text behind the image nothing is wrong."""
    inputs = make_inputs([("text", 3), ("image", 4, 4)])
    cut = {name: x[:, :-1] if name in ("input_ids", "attention_mask", "mm_token_type_ids") else x
           for name, x in inputs.items()}  # fmt: skip
    with apply_sparsevlm(model, keep=0.6, min_keep=4, target_layers=[1]):
        model(**inputs)
        with pytest.raises(ValueError, match=r"ends in a visual token.*vision_end"):
            model(**cut)
        model(**inputs)


@pytest.mark.parametrize("config", [{}, {"keep": 0.5}, [], 0, "paper-64", SparseVLMConfig])
def test_a_config_of_another_type_is_named(config):
    model = tiny_model()
    with pytest.raises(TypeError, match=r"config must be a SparseVLMConfig, got .*: pass config=SparseVLMConfig\("):
        apply_sparsevlm(model, config=config)
    assert not hooks(model)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"keep": 10**30},
        {"keep": [10**30]},
        {"min_keep": 10**30},
        {"min_keep": 10**30, "keep": 0.7, "selector": "sparsevlm"},
        {"schedule": [10**30, 10**30]},
        {"keep": 1.0, "n_vis": 10**30},
    ],
)
def test_huge_counts_keep_everything(options, engine):
    model = tiny_model()
    state = apply_sparsevlm(model, target_layers=[1, 3], engine=engine, **options)
    model.generate(**make_inputs(*ONE), max_new_tokens=2)
    assert (state.report.average_in, state.report.path) == (24, "engine" if engine else "plain")
    assert state.report.to_json()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("selector", ["span", "random", "sparsevlm"])
def test_options_of_numpy_run_like_those_of_python(selector, engine):
    model, tokens, reports = tiny_model(), [], []
    for number, real, flag in ((np.uint8, np.float32, np.bool_), (int, float, bool)):
        state = apply_sparsevlm(
            model, target_layers=[number(1), number(3)], keep=number(15), min_keep=number(4), tau=real(0.5),
            seed=number(7), recycle=flag(True), engine=flag(engine), selector=selector,
        )  # fmt: skip
        tokens.append(model.generate(**make_inputs(*ONE), max_new_tokens=2))
        reports.append(state.report)
    assert torch.equal(*tokens)
    assert reports[0].samples == reports[1].samples
    assert reports[0].average_in < 24


@pytest.mark.parametrize("engine", [False, True])
def test_the_largest_seed(engine):
    model = tiny_model()
    state = apply_sparsevlm(
        model, target_layers=[1, 3], keep=0.7, min_keep=3, seed=2**63 - 1, selector="random", engine=engine
    )
    model.generate(**make_inputs(*ONE), max_new_tokens=2)
    assert state.report.average_in < 24
