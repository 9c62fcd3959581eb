"""Several threads and one model: each waits its turn, with its own options and its own report."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer, TextIteratorStreamer
from transformers.generation import BaseStreamer

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.hooks.attention_probe import AttentionProbe
from sparsevlm.request.lock import GenerationLock
from toys import PROMPTS, make_inputs, tiny_model

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


@pytest.fixture
def held():
    """A lock that another thread holds until it is told to end."""
    lock, taken, end = GenerationLock(), threading.Event(), threading.Event()

    def hold():
        lock.acquire()
        taken.set()
        end.wait(20)
        lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    assert taken.wait(20)
    yield lock, end
    end.set()
    thread.join()


def test_the_lock_is_given_in_the_order_of_asking(held):
    lock, end = held
    order, threads = [], []
    for number in range(5):
        thread = threading.Thread(target=lambda number=number: (lock.acquire(), order.append(number), lock.release()))
        threads.append(thread)
        thread.start()
        while len(lock._waiting) <= number:
            time.sleep(0.001)
    end.set()
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_the_lock_may_be_taken_again_by_its_holder(held):
    lock, end = held
    with pytest.raises(TimeoutError, match=r"busy for 0\.01 s.*Raise the option timeout"):
        lock.acquire(0.01)
    assert not lock._waiting
    lock.release()  # not ours: nothing happens
    end.set()
    assert (lock.acquire(), lock.acquire()) == (1, 2)
    lock.release()
    assert lock.is_mine
    lock.release()
    assert not lock.is_mine


def take_and_give_back(lock, interrupted_at=None):
    """Counts lines of the lock; at one of them comes Ctrl-C."""
    lines, source = [], inspect.getsourcelines(sys.modules[GenerationLock.__module__])[0]
    apart = [i for i, line in enumerate(source, 1) if line.strip().startswith(("with ", "try:"))]

    def trace(frame, event, arg):
        if frame.f_code.co_filename != sys.modules[GenerationLock.__module__].__file__:
            return None
        if event == "line" and frame.f_lineno not in apart:  # where no signal comes between
            lines.append(frame.f_lineno)
            if len(lines) == interrupted_at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        lock.acquire()
        lock.release()
    finally:
        sys.settrace(before)
    return len(lines)


def test_ctrl_c_within_the_lock_keeps_no_later_call_waiting(other):
    for line in range(1, take_and_give_back(GenerationLock()) + 1):
        lock = GenerationLock()
        with pytest.raises(KeyboardInterrupt):
            take_and_give_back(lock, line)
        lock.release()  # as the next call does
        assert lock.acquire(1.0) == 1
        lock.release()
        assert other.submit(lock.acquire, 1.0).result() == 1, line


def test_the_lock_of_a_thread_that_ended_is_free(monkeypatch):
    monkeypatch.setattr("sparsevlm.request.lock._HEARTBEAT", 0.01)
    lock = GenerationLock()
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    assert lock.acquire(5.0) == 1


@pytest.mark.parametrize("call", ["generate", "forward", "tower alone", "decoder alone"])
@pytest.mark.parametrize("where", ["tower", "first layer", "target layer", "after the pass"])
@pytest.mark.parametrize("options", SELECTORS)
def test_a_second_thread_waits_and_does_no_harm(options, where, call, other):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    state = apply_sparsevlm(model, **SELECTORS[options])
    wanted = model.generate(**inputs, max_new_tokens=4)
    stages = state.report.samples
    one = make_inputs(*PROMPTS["one image"])
    calls = {
        "generate": lambda: model.generate(**one, max_new_tokens=2),
        "forward": lambda: model(**one).logits,
        "tower alone": lambda: (
            model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).last_hidden_state
        ),
        "decoder alone": lambda: model.model.language_model(inputs["input_ids"]).last_hidden_state,
    }
    alone = calls[call]()
    there, go_on = threading.Event(), threading.Event()

    def wait(module, args):
        there.set()
        assert go_on.wait(20)

    def ask():
        answer = model.generate(**inputs, max_new_tokens=4)
        return answer, state.report

    handle = places(model)[where].register_forward_pre_hook(wait)
    running = other.submit(ask)
    assert there.wait(20)
    with state.options(timeout=0.02), pytest.raises(TimeoutError, match="another thread"):
        calls[call]()
    threading.Timer(0.05, go_on.set).start()
    assert torch.equal(calls[call](), alone)
    answer, report = running.result()
    assert torch.equal(answer, wanted)
    assert report.samples == stages
    handle.remove()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("where", ["tower", "target layer", "after the pass"])
@pytest.mark.parametrize("options", SELECTORS)
def test_a_failure_locks_nothing(options, where, call, error):
    """In a thread that lives on; Ctrl-C in a direct call is told to no hook."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    apply_sparsevlm(model, **SELECTORS[options])
    wanted = model.generate(**inputs, max_new_tokens=4)

    def fail(module, args):
        raise error("in the middle")

    def ask():
        return model.generate(**inputs, max_new_tokens=4) if call == "generate" else model(**inputs)

    handle = places(model)[where].register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the middle"):
        ask()
    handle.remove()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), wanted)
    handle = places(model)[where].register_forward_pre_hook(fail)
    with pytest.raises(error, match="in the middle"):
        ask()
    handle.remove()
    model(**inputs)
    with ThreadPoolExecutor(1) as executor:
        assert torch.equal(executor.submit(model.generate, **inputs, max_new_tokens=4).result(20), wanted)
    remove_sparsevlm(model)
    assert not AttentionProbe._armed


def test_threads_without_a_lock_of_their_own():
    model = tiny_model()
    apply_sparsevlm(model, **SELECTORS["tower"])
    prompts = [make_inputs(*PROMPTS[name]) for name in ("one image", "two images", "video")]
    wanted = [model.generate(**inputs, max_new_tokens=4) for inputs in prompts]

    def ask(number):
        return torch.equal(model.generate(**prompts[number % 3], max_new_tokens=4), wanted[number % 3])

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(ask, range(24)))


def test_every_thread_has_its_own_options_and_report():
    model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 8, 10), ("text", 7)])
    state = apply_sparsevlm(model, keep=0.6, min_keep=3)
    budgets = [0.5, 0.6, 0.7, 0.8, 1.0]

    def ask(number):
        keep = budgets[number % len(budgets)]
        with state.options(keep=keep):
            model.generate(**inputs, max_new_tokens=2)
            return state.report.samples[0].budget == pytest.approx(keep * 80)

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(ask, range(40)))
    assert state.config.keep == 0.6


def test_options_end_in_any_order():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, keep=0.6, min_keep=3)
    first, second = state.options(keep=0.7), state.options(keep=0.8)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.samples[0].budget == pytest.approx(0.8 * 24)
    second.__exit__(None, None, None)
    model.generate(**inputs, max_new_tokens=1)
    assert state.report.samples[0].budget == pytest.approx(0.6 * 24)


def test_tasks_have_their_own_options():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, keep=0.6, min_keep=3)

    async def ask(keep):
        with state.options(keep=keep):
            await asyncio.sleep(0.01)
            await asyncio.to_thread(model.generate, **inputs, max_new_tokens=1)
            await asyncio.sleep(0.01)
            model.generate(**inputs, max_new_tokens=1)
            return state.report.samples[0].budget

    async def all_of_them():
        return await asyncio.gather(*map(ask, (0.5, 0.7, 0.9)))

    assert asyncio.run(all_of_them()) == pytest.approx([12, 0.7 * 24, 0.9 * 24])


def test_options_that_do_not_hold_in_a_thread_are_told(other, caplog):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, keep=0.6, min_keep=3)
    with state.options(keep=0.9):
        for _ in range(2):
            other.submit(model.generate, **inputs, max_new_tokens=1).result()
        assert caplog.text.count("copy_context().run") == 1
        assert other.submit(lambda: state.report.samples[0].budget).result() == pytest.approx(0.6 * 24)
        context = contextvars.copy_context()
        other.submit(context.run, model.generate, **inputs, max_new_tokens=1).result()
        assert state._session.request.samples[0].plan.budget == pytest.approx(0.9 * 24)


def test_a_thread_without_requests_reads_the_last_of_any(other):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, keep=0.6, min_keep=3)
    other.submit(model.generate, **inputs, max_new_tokens=3).result()  # as transformers' streaming recipe does
    assert state.report.decode_steps == 2


def test_two_streams_in_two_threads_both_end():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **SELECTORS["inside"])
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    streamers = [TextIteratorStreamer(tokenizer, timeout=20) for _ in range(2)]
    threads = [
        threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 4, "streamer": streamer})
        for streamer in streamers
    ]
    for thread in threads:
        thread.start()
    first, second = ("".join(streamer) for streamer in streamers)
    for thread in threads:
        thread.join()
    assert first == second != ""


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("failure", ["bad option", "wrong inputs", "in a layer", "later on", "waiting"])
def test_a_stream_ends_where_an_error_ends_the_call(failure, engine, held):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **SELECTORS["inside"], engine=engine)
    streamer, options = TextIteratorStreamer(AutoTokenizer.from_pretrained(bundled_path()), timeout=20), {}
    if failure == "bad option":
        options["no_such_option"] = 1
    elif failure == "wrong inputs":
        inputs["input_ids"] = inputs["input_ids"][0]
    elif failure == "later on":
        options["logits_processor"] = [lambda ids, scores: scores if ids.shape[1] < 38 else 1 / 0]
    elif failure == "in a layer":
        model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    else:
        state._session.lock = held[0]
    with state.options(timeout=0.05), pytest.raises((ValueError, ZeroDivisionError, TimeoutError)):
        model.generate(**inputs, max_new_tokens=4, streamer=streamer, **options)
    list(streamer)  # does not wait for ever


def test_a_thread_that_has_streamed_its_last_token_is_waited_for(other):
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
