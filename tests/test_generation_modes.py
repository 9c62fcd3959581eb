"""Every mode of ``generate`` answers as transformers does where nothing is pruned, or is refused before any work."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, AutoTokenizer, ContinuousBatchingConfig, DynamicCache
from transformers import cache_utils as caches

from generation_modes import ENGINE, HOOKS, MODES, PRUNED, REFUSED, TRANSFORMERS, pruned_assistant, rows, smaller_model
from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.request import modes
from toys import (
    AUDIO,
    AUDIO_START,
    IMAGE,
    INDICATORS,
    IS_OLD,
    PROMPTS,
    VIDEO,
    VISION_START,
    make_inputs,
    relative_error,
    tiny_model,
)

GREEDY = {
    "max_new_tokens": 8,
    "do_sample": False,
    "suppress_tokens": [*INDICATORS, IMAGE, VIDEO, VISION_START, AUDIO, AUDIO_START],
}
RUNS = {name: mode for name, mode in MODES.items() if mode.on in (ENGINE, HOOKS)}
REFUSALS = {name: mode for name, mode in MODES.items() if mode.on in (REFUSED, TRANSFORMERS)}


def ask(mode, model, **more):
    inputs = make_inputs(*PROMPTS["one image"], family=mode.family)
    options = {**inputs, **GREEDY, **mode.options(model, inputs), **more}
    for name in mode.drops_inputs:
        del options[name]
    torch.manual_seed(0)
    output = model.generate(**options)
    return getattr(output, "sequences", output)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_modes_that_run(name, engine):
    mode, model = MODES[name], tiny_model(MODES[name].family)
    dense = ask(mode, model)
    apply_sparsevlm(model, keep=1.0, engine=engine)
    assert torch.equal(ask(mode, model), dense)
    state = apply_sparsevlm(model, **PRUNED, engine=engine)
    found = ask(mode, model)
    assert state.report.path == (mode.on if engine else HOOKS)
    assert state.report.final_tokens < state.report.samples[0].n_visual
    if mode.as_greedy:
        assert torch.equal(found, ask(MODES["greedy"], model))


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("name", REFUSALS)
def test_modes_that_are_refused(name, engine):
    """Ours before any work: the vision tower has not run."""
    mode, model = MODES[name], tiny_model(MODES[name].family)
    if "quanto" in mode.error and caches.is_optimum_quanto_available():
        pytest.skip("optimum-quanto is installed")
    state, ran = apply_sparsevlm(model, **PRUNED, engine=engine), []
    state.adapter.vision.module.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises((NotImplementedError, ValueError, TypeError, ImportError), match=mode.error):
        ask(mode, model)
    assert not ran or mode.on == TRANSFORMERS
    assert torch.equal(ask(MODES["greedy"], model), ask(MODES["greedy"], model))


def test_the_page_has_the_table():
    page = (Path(__file__).parents[1] / "docs" / "generation_modes.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith("| ") and "| option |" not in line] == rows()


def prompt_and(inputs, ids):
    """The inputs of a prompt that has gone on with some tokens of text."""
    n_more = ids.shape[1] - inputs["input_ids"].shape[1]
    fillers = {"attention_mask": 1, "mm_token_type_ids": 0}
    tokens = {
        name: torch.nn.functional.pad(inputs[name], (0, n_more), value=filler) for name, filler in fillers.items()
    }
    return {**inputs, **tokens, "input_ids": ids}


@pytest.mark.parametrize("keep", [None, 1.0, 0.5])
@pytest.mark.parametrize("sampling", [False, True])
def test_a_pruned_assistant_sees_and_prunes_the_images(keep, sampling):
    """In every round it drafts what it would answer by itself, behind the tokens that are accepted."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    assistant = tiny_model(seed=3) if keep is None else smaller_model()
    if keep is not None:
        apply_sparsevlm(model, **{**PRUNED, "keep": keep})
    wanted = model.generate(**inputs, **GREEDY)
    state, drafted, inner = apply_sparsevlm(assistant, **PRUNED), [], assistant.generate

    def noted(*args, **kwargs):
        output = inner(*args, **kwargs)
        drafted.append((kwargs["input_ids"], output.sequences))
        return output

    noted.is_sparsevlm = True
    assistant.generate = noted
    found = model.generate(**inputs, **{**GREEDY, "do_sample": sampling}, assistant_model=assistant)
    assert state.report.final_tokens < 24
    assert state.report.decode_steps >= len(drafted) - 1 > 0
    if sampling:
        return
    assert torch.equal(found, wanted)
    if keep is None and not IS_OLD:
        return  # features of the target's tower take the place of its own
    for given, answered in drafted:
        n_new = answered.shape[1] - given.shape[1]
        alone = inner(**prompt_and(inputs, given), **{**GREEDY, "max_new_tokens": n_new})
        assert torch.equal(answered, alone)


@pytest.mark.skipif(IS_OLD, reason="hands on the images themselves")
def test_features_of_a_target_that_do_not_fit_the_assistant():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    assistant = smaller_model()
    apply_sparsevlm(assistant, **PRUNED)
    with pytest.raises(ValueError, match=r"width 32, was handed image features of width 64.*target, keep=1.0"):
        model.generate(**inputs, **GREEDY, assistant_model=assistant)


def test_a_pruned_assistant_does_not_join_a_conversation_with_images():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **PRUNED)
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assistant = smaller_model()
    more = make_inputs([("text", 2), ("image", 4, 4), ("text", 3)], seed=9)
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    inputs = {
        **more,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "past_key_values": first.past_key_values,
    }
    del inputs["mm_token_type_ids"]
    apply_sparsevlm(assistant, **PRUNED)
    with pytest.raises(NotImplementedError, match="begin with the whole conversation"):
        model.generate(**inputs, **GREEDY, assistant_model=assistant)


def test_an_assistant_that_is_the_model_itself_leaves_the_report_of_the_call():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **PRUNED)
    model.generate(**inputs, **GREEDY, assistant_model=model)
    assert state.report.samples[0].n_visual == 24
    assert state.report.skipped_because is None


def without_loss(monkeypatch, kind):
    """Packs nothing, so that a quantized cache holds what a dynamic one does."""
    monkeypatch.setattr(kind, "__init__", kind.__mro__[1].__init__)
    monkeypatch.setattr(kind, "_quantize", lambda self, tensor, axis=None, scale=None: (tensor.clone(), 1.0))
    monkeypatch.setattr(kind, "_dequantize", lambda self, packed: packed[0])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", ["one image", "batch, left padding", "batch, unequal counts"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_quantized_cache_holds_what_is_left(prompt, attention, beams, monkeypatch):
    """Where packing loses nothing it is a dynamic cache, also where the rest that is not packed gets full."""
    if beams > 1 and IS_OLD:
        pytest.skip("such beams are refused")
    without_loss(monkeypatch, caches.QuantoQuantizedLayer)
    model, inputs = tiny_model(attn=attention), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, **PRUNED)
    options = {**GREEDY, "num_beams": beams, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(**inputs, **options)
    kept = state.report.kv_bytes.sparse
    packed = {"backend": "quanto", "residual_length": 3}
    found = model.generate(**inputs, **options, cache_implementation="quantized", cache_config=packed)
    assert torch.equal(found.sequences, wanted.sequences)
    for got, right in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(got, right) < 1e-5
    assert state.report.kv_bytes.sparse == kept
    assert state.report.path_reason.endswith("own modules")


@pytest.mark.parametrize(
    "options", [PRUNED, {"keep": 0.5, "min_keep": 3, "selector": "divprune"}], ids=["inside", "before"]
)
def test_a_quantized_cache_goes_on_and_begins_again(options, monkeypatch):
    without_loss(monkeypatch, caches.QuantoQuantizedLayer)
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **options)
    answers = []
    for make in (DynamicCache, lambda config: caches.QuantizedCache("quanto", config)):
        cache = make(config=model.config.get_text_config())
        first = model.generate(**inputs, **GREEDY, past_key_values=cache)
        assert cache.get_seq_length() == first.shape[1] - 1
        ids = torch.cat([first, make_inputs([("text", 5)], seed=4)["input_ids"]], dim=1)
        second = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, past_key_values=cache)
        answers.append((first, second))
        if make is not DynamicCache:
            assert [layer.get_seq_length() for layer in cache.layers] == [second.shape[1] - 1] * 6
            with pytest.raises(NotImplementedError, match="cannot be cropped"):
                cache.crop(-1)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), first)
    assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))


def test_later_questions_choose_anew_in_a_quantized_cache(monkeypatch):
    without_loss(monkeypatch, caches.QuantoQuantizedLayer)
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state, answers = apply_sparsevlm(model, **{**PRUNED, "selector": "sparsevlm"}, turns="refresh"), []
    for make in (DynamicCache, lambda config: caches.QuantizedCache("quanto", config, residual_length=3)):
        cache = make(config=model.config.get_text_config())
        ids = model.generate(**inputs, **GREEDY, past_key_values=cache)
        ids = torch.cat([ids, make_inputs([("text", 5)], seed=4)["input_ids"]], dim=1)
        answers.append(model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, past_key_values=cache))
        assert state.report.samples[0].n_visual == 24
        assert state.report.final_tokens < 24
    assert torch.equal(*answers)
    assert {layer.residual_length for layer in cache.layers} == {3}


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_what_quantized_caches_do_not_do(options):
    if "num_beams" in options and not IS_OLD:
        pytest.skip("newer transformers reorder them")
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **PRUNED)
    with pytest.raises(NotImplementedError, match="on a quantized cache"):
        model.generate(**inputs, **GREEDY, **options, cache_implementation="quantized")


PACKED = {
    "fp8": {},
    "quanto": {"q_group_size": 16, "residual_length": 4},
    "hqq": {"q_group_size": 16, "residual_length": 4, "nbits": 8, "axis_key": 1, "axis_value": 1},
}
IS_INSTALLED = {
    "fp8": hasattr(caches, "Fp8QuantizedLayer"),  # older transformers have no such cache
    "quanto": caches.is_optimum_quanto_available(),
    "hqq": caches.is_hqq_available(),
}


@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
@pytest.mark.parametrize("backend", PACKED)
def test_a_packed_cache_loses_no_more_than_a_dense_one(backend, prompt):
    """The first tokens are of exact keys, the next of packed ones; later answers may be others."""
    if not IS_INSTALLED[backend]:
        pytest.skip(f"{backend} is not there")
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    options = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}

    def loss():
        config = {"backend": backend, **PACKED[backend]}  # older transformers take out what they have read
        packed = {**options, "cache_implementation": "quantized", "cache_config": config}
        exact, rounded = model.generate(**inputs, **options).logits, model.generate(**inputs, **packed).logits
        assert relative_error(rounded[0], exact[0]) < 1e-5
        return max(relative_error(a, b) for a, b in zip(rounded, exact, strict=True))

    dense = loss()
    state = apply_sparsevlm(model, keep=1.0)
    assert loss() == pytest.approx(dense, rel=1e-3)
    state = apply_sparsevlm(model, **PRUNED)
    assert 0 < loss() < 3 * dense
    assert state.report.kv_bytes.sparse < state.report.kv_bytes.dense
    held = state.report.kv_bytes.sparse
    model.generate(**inputs, **options)
    assert held < state.report.kv_bytes.sparse / 2


class Stream(contextlib.nullcontext):
    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_an_offloaded_cache_whose_copies_stay_where_they_are(implementation, prompt, monkeypatch):
    """Without a GPU the copies are none; what is asked of the layers is the same."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(modes, "_OF_ALL_CALLS", ())
    check_offloaded(tiny_model(), make_inputs(*PROMPTS[prompt]), implementation)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("prompt", ["one image", "batch, unequal counts"])
def test_an_offloaded_cache(implementation, prompt, monkeypatch):
    """However late attention comes to read what the next layer's copies could overwrite."""
    attend = torch.nn.functional.scaled_dot_product_attention

    def late(*args, **kwargs):
        torch.cuda._sleep(3_000_000)
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", late)
    inputs = {name: value.cuda() for name, value in make_inputs(*PROMPTS[prompt]).items()}
    check_offloaded(tiny_model().cuda(), inputs, implementation)


def check_offloaded(model, inputs, implementation):
    state = apply_sparsevlm(model, **PRUNED)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with state.options(engine=False):
        wanted = model.generate(**inputs, **options)
    found = model.generate(**inputs, **options, cache_implementation=implementation)
    assert state.report.path == HOOKS
    assert state.report.final_tokens < 24
    for got, right in zip(found.logits, wanted.logits, strict=True):
        assert relative_error(got, right) < 1e-5


@pytest.mark.skipif(IS_OLD, reason="older transformers find no memory for it on a CPU")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_continuous_batching_of_text_runs_as_without(family):
    model, inputs = tiny_model(family), make_inputs(*PROMPTS["one image"], family=family)

    def ask_batch():
        config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, use_cuda_graph=False)
        answers = model.generate_batch(
            [[5, 6, 7, 8], [9, 10, 11]], continuous_batching_config=config, max_new_tokens=4
        ).values()
        assert not any(answer.error for answer in answers)
        return [answer.generated_tokens for answer in answers]

    wanted = ask_batch()
    assert all(len(tokens) == 4 for tokens in wanted)
    state = apply_sparsevlm(model, **PRUNED)
    first = model.generate(**inputs, **GREEDY)
    assert ask_batch() == wanted
    assert torch.equal(model.generate(**inputs, **GREEDY), first)
    assert state.report.final_tokens < 24


def test_stop_strings_end_an_answer_and_a_streamer_for_asyncio_tells_it():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    apply_sparsevlm(model, **PRUNED)
    whole = model.generate(**inputs, **GREEDY)
    words = tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :])

    async def listen():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
        thread.start()
        heard = [part async for part in streamer]
        thread.join()
        return "".join(heard)

    assert asyncio.run(listen()) == words
    last = tokenizer.decode(whole[0, -4:-3])
    stopped = model.generate(**inputs, **GREEDY, stop_strings=[last], tokenizer=tokenizer)
    assert stopped.shape[1] < whole.shape[1]
    drafted = model.generate(
        **inputs, **GREEDY, stop_strings=[last], tokenizer=tokenizer, assistant_model=pruned_assistant()
    )
    assert torch.equal(drafted[:, : stopped.shape[1]], stopped)
