"""Several threads and one model: one after the other is fine, at once is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.generation import BaseStreamer

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.runtime import threads
from sparsevlm.runtime.probe import AttentionProbe
from toys import PROMPTS, make_inputs, tiny_model

REFUSAL = "generating in another thread.*one model or one process per thread"
SELECTORS = {"inside": {"keep": 0.6, "min_keep": 3}, "tower": {"keep": 0.5, "min_keep": 3, "selector": "visionzip"}}


def places(model):
    """Modules in whose middle another thread may come: in the tower, in the decoder, and after a pass."""
    return {
        "tower": model.model.visual.blocks[-1].attn.proj,
        "first layer": model.model.language_model.layers[0].self_attn.o_proj,
        "target layer": model.model.language_model.layers[2].self_attn.o_proj,
        "after the pass": model.lm_head,
    }


@pytest.fixture
def other():
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture(autouse=True)
def no_patience(request, monkeypatch):
    if "patience" not in request.node.name:
        monkeypatch.setattr(threads, "_PATIENCE", 0.0)


@pytest.mark.parametrize("call", ["generate", "forward", "tower alone", "decoder alone"])
@pytest.mark.parametrize("where", ["tower", "first layer", "target layer", "after the pass"])
@pytest.mark.parametrize("options", SELECTORS)
def test_a_second_thread_is_refused_and_does_no_harm(options, where, call, other):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    state = apply_sparsevlm(model, **SELECTORS[options])
    wanted = model.generate(**inputs, max_new_tokens=4)
    stages = state.report.samples
    there, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        there.set()
        assert go_on.wait(20)

    handle = places(model)[where].register_forward_pre_hook(wait)
    running = other.submit(model.generate, **inputs, max_new_tokens=4)
    assert there.wait(20)
    calls = {
        "generate": lambda: model.generate(**make_inputs(*PROMPTS["one image"]), max_new_tokens=2),
        "forward": lambda: model(**make_inputs(*PROMPTS["one image"])),
        "tower alone": lambda: model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]),
        "decoder alone": lambda: model.model.language_model(inputs["input_ids"]),
    }
    try:
        with pytest.raises(RuntimeError, match=REFUSAL):
            calls[call]()
    finally:
        go_on.set()
    assert torch.equal(running.result(), wanted)
    handle.remove()
    assert state.report.samples == stages
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
@pytest.mark.parametrize("where", ["tower", "target layer", "after the pass"])
@pytest.mark.parametrize("options", SELECTORS)
def test_a_failure_in_another_thread_locks_nothing(options, where, error, other):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    apply_sparsevlm(model, **SELECTORS[options])
    wanted = model.generate(**inputs, max_new_tokens=4)

    def fail(module, args):
        raise error("in the middle")

    handle = places(model)[where].register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the middle"):
        other.submit(model.generate, **inputs, max_new_tokens=4).result()
    handle.remove()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)  # the other thread lives on, and idles
    remove_sparsevlm(model)
    assert not AttentionProbe._armed


def test_one_thread_after_the_other(other):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **SELECTORS["inside"])
    wanted = model.generate(**inputs, max_new_tokens=4)
    for _ in range(3):
        assert torch.equal(other.submit(model.generate, **inputs, max_new_tokens=4).result(), wanted)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)


def test_a_lock_around_generate_is_enough():
    model = tiny_model()
    apply_sparsevlm(model, **SELECTORS["inside"])
    prompts = [make_inputs(*PROMPTS[name]) for name in ("one image", "two images", "video")]
    wanted = [model.generate(**inputs, max_new_tokens=4) for inputs in prompts]
    lock = threading.Lock()

    def ask(number):
        with lock:
            return torch.equal(model.generate(**prompts[number % 3], max_new_tokens=4), wanted[number % 3])

    with ThreadPoolExecutor(3) as executor:
        assert all(executor.map(ask, range(12)))


def test_without_a_lock_the_answer_is_right_or_refused():
    model = tiny_model()
    apply_sparsevlm(model, **SELECTORS["tower"])
    prompts = [make_inputs(*PROMPTS[name]) for name in ("one image", "two images")]
    wanted = [model.generate(**inputs, max_new_tokens=4) for inputs in prompts]

    def ask(number):
        try:
            return torch.equal(model.generate(**prompts[number % 2], max_new_tokens=4), wanted[number % 2])
        except RuntimeError as error:
            return "another thread" in str(error)

    with ThreadPoolExecutor(2) as executor:
        assert all(executor.map(ask, range(30)))


def test_patience_with_a_thread_that_has_streamed_its_last_token(other):
    """The reader sees the end of the stream a moment before generate has come back."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **SELECTORS["inside"])
    wanted = model.generate(**inputs, max_new_tokens=4)
    ended = threading.Event()

    class Streamer(BaseStreamer):
        def put(self, value):
            pass

        def end(self):
            ended.set()
            threading.Event().wait(0.05)

    streaming = other.submit(model.generate, **inputs, max_new_tokens=4, streamer=Streamer())
    assert ended.wait(20)
    assert not streaming.done()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)
    assert torch.equal(streaming.result(), wanted)
