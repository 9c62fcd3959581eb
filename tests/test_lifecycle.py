"""What stays alive, what copies carry, how options nest, what a report books to whom."""

from __future__ import annotations

import copy
import gc
import time
import weakref

import pytest
import torch
from transformers import GenerationConfig

from sparsevlm import apply_sparsevlm, remove_sparsevlm, reset_n_vis
from toys import PAD, PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.6, "min_keep": 3, "target_layers": [1, 3]}
ONE = PROMPTS["one image"]


@pytest.mark.parametrize("removed", [True, False])
def test_an_applied_model_is_freed(removed):
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**make_inputs(*ONE), max_new_tokens=2)
    if removed:
        remove_sparsevlm(model)
    gone = weakref.ref(model)
    del model, state
    gc.collect()
    assert gone() is None


def test_tensors_do_not_pile_up_over_requests():
    model = tiny_model()
    apply_sparsevlm(model, **OPTIONS)
    counts = []
    for round_ in range(12):
        model.generate(**make_inputs([("text", 3), ("image", 3 + round_ % 3, 5), ("text", 4)]), max_new_tokens=2)
        gc.collect()
        counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[-1] <= counts[2] + 5


def test_a_copy_prunes_and_can_be_removed_by_itself():
    model, inputs = tiny_model(), make_inputs(*ONE)
    dense = model.generate(**inputs, max_new_tokens=4)
    apply_sparsevlm(model, **OPTIONS)
    sparse = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), sparse.sequences)
    apply_sparsevlm(twin, **OPTIONS)
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), sparse.sequences)
    remove_sparsevlm(twin)
    assert not any(module._forward_pre_hooks for module in twin.modules())
    assert torch.equal(twin.generate(**inputs, max_new_tokens=4), dense)
    again = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert [len(layer.keys[0, 0]) for layer in again.past_key_values.layers] == [
        len(layer.keys[0, 0]) for layer in sparse.past_key_values.layers
    ]


def test_two_models_over_the_same_modules_are_refused():
    model, other = tiny_model(), tiny_model()
    other.model = model.model
    apply_sparsevlm(model, **OPTIONS)
    with pytest.raises(ValueError, match="shares these modules"):
        apply_sparsevlm(other, **OPTIONS)


def test_a_refused_crop_changes_nothing():
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, **OPTIONS)
    cache = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    with pytest.raises(ValueError, match="cannot crop 20 tokens off a pruned cache"):
        cache.crop(-20)
    assert [layer.keys.shape[-2] for layer in cache.layers] == lengths
    cache.crop(-2)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [length - 2 for length in lengths]


def test_logits_to_keep_changes_no_choice():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    with torch.no_grad():
        full = model(**inputs).logits
        whole = state.report
        last = model(**inputs, logits_to_keep=5).logits
    assert torch.equal(full[:, -5:], last)
    assert state.report.samples == whole.samples
    assert state.report.logit_positions == (whole.logit_positions[0][-5:],)
    with pytest.raises(NotImplementedError, match="logits_to_keep as a tensor"):
        model(**inputs, logits_to_keep=torch.tensor([1]))


def test_gradient_checkpointing_is_refused_with_the_remedy():
    model, inputs = tiny_model(), make_inputs(*ONE)
    apply_sparsevlm(model, **OPTIONS)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="gradient_checkpointing_disable"):
        model(**inputs, use_cache=False)
    model.gradient_checkpointing_disable()
    model(**inputs, use_cache=False).logits.sum().backward()


def test_grids_of_beams_are_those_of_their_sample():
    model = tiny_model()
    inputs = make_inputs([("image", 4, 6), ("text", 5)], [("text", 9), ("image", 3, 4), ("text", 5)])
    state = apply_sparsevlm(model, **OPTIONS)
    model.model.get_image_features(inputs["pixel_values"][:96], inputs["image_grid_thw"][:1])  # of somebody else
    model.generate(**inputs, max_new_tokens=2, num_beams=2)
    assert [sample.grids for sample in state.report.samples] == [((1, 4, 6),)] * 2 + [((1, 3, 4),)] * 2


def test_nested_options_restore_what_was_in_force():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    with state.options(keep=0.6), state.options(keep=0.75):
        with state.options(keep=0.6):
            pass
        reset_n_vis(state, 24)
        assert state._session.options.given.keep == 0.75
        assert state._session.options.given.n_vis == 24
        model.generate(**inputs, max_new_tokens=1)
        assert 0.6 * 24 < state.report.average_in <= 0.75 * 24
    assert state._session.options.given == state.config
    with state.options(preset=None, keep=0.9):
        pass


def test_options_of_a_replaced_state_are_refused():
    model = tiny_model()
    with apply_sparsevlm(model, **OPTIONS) as first:
        second = apply_sparsevlm(model, **OPTIONS)
        with pytest.raises(RuntimeError, match="removed or replaced"), first.options(keep=0.9):
            pass
    assert second.attached  # leaving the first context does not touch the second state
    assert model.generate is second._generate


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("method", ["options", "warmup", "expect_n_visual", "reset_n_vis", "with"])
def test_a_state_that_is_not_in_force_says_so(method, replaced):
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    if replaced:
        apply_sparsevlm(model, **OPTIONS)
    else:
        remove_sparsevlm(model)
    call = {
        "options": lambda: state.options(keep=0.9).__enter__(),
        "warmup": lambda: state.warmup(inputs),
        "expect_n_visual": lambda: state.expect_n_visual(24),
        "reset_n_vis": lambda: reset_n_vis(state, 24),
        "with": state.__enter__,
    }[method]
    with pytest.raises(RuntimeError, match=r"removed or replaced.*the state that the last apply_sparsevlm returned"):
        call()


def test_a_state_is_attached_once_and_beside_no_other():
    model, inputs = tiny_model(), make_inputs(*ONE)
    first = apply_sparsevlm(model, **OPTIONS)
    n_hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    first.attach()
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == n_hooks
    second = apply_sparsevlm(model, **OPTIONS)
    with pytest.raises(RuntimeError, match="another apply_sparsevlm is in force"):
        first.attach()
    second.detach()
    first.attach()
    model.generate(**inputs, max_new_tokens=1)
    assert first.report.final_tokens < 24


class WarmupError(Exception):
    pass


def fail(module, args):
    raise WarmupError("in the middle")


@pytest.mark.parametrize("error", [WarmupError, KeyboardInterrupt])
def test_a_warmup_that_fails_applies_nothing(error):
    model, inputs = tiny_model(), make_inputs(*ONE)
    dense = model.generate(**inputs, max_new_tokens=4)

    def fail(module, args):
        raise error

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(error):
        apply_sparsevlm(model, **OPTIONS, warmup=inputs)
    handle.remove()
    assert "generate" not in vars(model)
    assert not hasattr(model.model, "_sparsevlm_state")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), dense)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_warmup_that_fails_leaves_what_was_applied_before(wrapped):
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    sparse = model.generate(**inputs, max_new_tokens=4)
    report, seen = state.report, []
    if wrapped:
        inner = model.generate
        model.generate = lambda *args, **kwargs: seen.append(1) or inner(*args, **kwargs)
    before = model.generate
    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(WarmupError):
        apply_sparsevlm(model, keep=0.9, min_keep=3, warmup=[inputs])
    handle.remove()
    assert state.attached
    assert model.generate is before
    assert state.report == report
    seen.clear()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), sparse)
    assert len(seen) == wrapped
    assert state.report.samples == report.samples
    remove_sparsevlm(model)
    assert not state.attached


def out_of_disk(input_ids, scores):
    raise OSError("disk")


def test_a_warmup_that_fails_on_the_engine_leaves_the_engine_of_before():
    model, inputs = tiny_model(), make_inputs(*ONE)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    sparse, samples = model.generate(**inputs, max_new_tokens=4), state.report.samples
    with pytest.raises(OSError, match="disk"):
        apply_sparsevlm(
            model, keep=0.9, min_keep=3, engine=True, warmup=[inputs, inputs | {"logits_processor": [out_of_disk]}]
        )
    assert state.attached
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), sparse)
    assert (state.report.path, state.report.samples) == ("engine", samples)
    remove_sparsevlm(model)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("warmup", ["inputs", ["inputs"], [3], 5, [{}]], ids=str)
def test_a_warmup_of_something_else_is_refused_before_anything_is_applied(warmup):
    model = tiny_model()
    with pytest.raises(TypeError, match=r"warmup must be inputs of generate.*got (str|int|an empty mapping)"):
        apply_sparsevlm(model, **OPTIONS, warmup=warmup)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("alike", [False, True], ids=["other prompts", "equal ids"])
def test_budgets_of_another_number_of_samples_are_refused(alike, engine):
    model = tiny_model()
    inputs = make_inputs(*[[("text", 3 if alike else 3 + i), ("image", 4, 6), ("text", 7)] for i in range(4)])
    if alike:
        inputs["input_ids"] = inputs["input_ids"][:1].repeat(4, 1)
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    for ways in ({}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}):
        with state.options(keep=[0.6, 1.0]), pytest.raises(ValueError, match="2 budgets for a batch of 4 samples"):
            model.generate(**inputs, max_new_tokens=1, **ways)
    with state.options(keep=[0.6, 1.0]), pytest.raises(ValueError, match="2 budgets for a batch of 4 samples"):
        model(**inputs)
    model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("where", ["arguments", "generation_config", "model"])
@pytest.mark.parametrize("ways", [{"num_return_sequences": 2, "do_sample": True}, {"num_beams": 2}], ids=str)
def test_budgets_of_a_prompt_are_those_of_its_copies(ways, where, engine):
    model = tiny_model()
    inputs = make_inputs(*[[("text", 3), ("image", 4, 6), ("text", 7)]] * 2)
    inputs["input_ids"] = inputs["input_ids"][:1].repeat(2, 1)
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    options = {"max_new_tokens": 2}
    if where == "generation_config":
        options["generation_config"] = GenerationConfig(**ways, pad_token_id=PAD)
    elif where == "model":
        for name, value in ways.items():
            setattr(model.generation_config, name, value)
    else:
        options |= ways
    with state.options(keep=[0.6, 1.0]):
        model.generate(**inputs, **options)
    assert [sample.budget for sample in state.report.samples] == [pytest.approx(0.6 * 24)] * 2 + [24] * 2
    with (
        state.options(keep=[0.6, 1.0, 1.0, 0.6]),
        pytest.raises(ValueError, match=r"4 budgets for a batch of 2 samples"),
    ):
        model.generate(**inputs, **options)


def test_a_report_books_its_own_conversation_only():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    model.generate(**make_inputs([("image", 5, 5), ("text", 4)]), max_new_tokens=3)
    assert state.report.n_visual == 25
    turn = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    model.generate(input_ids=turn, past_key_values=first.past_key_values, max_new_tokens=3)
    assert state.report.samples == ()
    assert state.report.decode_steps == 2


def test_decode_time_is_the_models_not_the_users():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    time.sleep(1.0)
    turn = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    model.generate(input_ids=turn, past_key_values=first.past_key_values, max_new_tokens=3)
    assert state.report.wall_ms["decode"] < 900


def test_a_report_read_early_is_made_anew_at_the_end():
    seen = []

    class Curious:
        def select(self, context, n_keep):
            seen.append(state.report)
            return torch.arange(n_keep)

    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS, selector=Curious())
    model.generate(**inputs, max_new_tokens=1)
    assert len(state.report.samples[0].layer_tokens) == 6
    assert len(seen[0].samples[0].layer_tokens) < 6


def test_recycling_that_puts_everything_back_is_said_so():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, selector="sparsevlm", min_keep=3, tau=1.0, theta=1.0)
    model.generate(**inputs, max_new_tokens=1)
    assert "puts back all that would be dropped" in state.report.samples[0].stages[0].skipped_because


def test_a_cache_that_was_reset_starts_a_new_request():
    model, inputs = tiny_model(), make_inputs(*ONE)
    state = apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**inputs, max_new_tokens=3)
    cache = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    cache.reset()
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, past_key_values=cache), wanted)
    cache.reset()
    model.generate(**make_inputs([("text", 6)]), max_new_tokens=3, past_key_values=cache)
    assert state.report.skipped_because == "no image or video in the input"
