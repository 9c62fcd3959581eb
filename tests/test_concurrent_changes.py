"""Removal, applying again and reports while requests of other threads and tasks run."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.45, "min_keep": 1, "target_layers": [0, 2]}


def apply_again(model):
    apply_sparsevlm(model, keep=0.9)


@pytest.mark.parametrize("change", [remove_sparsevlm, apply_again])
@pytest.mark.parametrize("ways", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("engine", [False, True])
def test_a_change_waits_for_the_request_that_runs(engine, ways, change):
    model, inputs = tiny_model(seed=3), make_inputs(*PROMPTS["two images"], seed=5)
    dense = model.generate(**inputs, max_new_tokens=8, **ways)
    state, changes = apply_sparsevlm(model, **OPTIONS, engine=engine), []
    wanted = model.generate(**inputs, max_new_tokens=8, **ways)

    def in_the_middle(ids, scores):
        if not changes:
            changes.append(threading.Thread(target=change, args=(model,)))
            changes[0].start()
            changes[0].join(0.1)
            assert changes[0].is_alive()
        return scores

    found = model.generate(**inputs, max_new_tokens=8, **ways, logits_processor=[in_the_middle])
    changes[0].join(20)
    assert not changes[0].is_alive()
    assert torch.equal(found, wanted)
    assert not state.attached
    remove_sparsevlm(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, **ways), dense)


def test_a_call_that_waited_while_the_model_was_removed_is_dense():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    dense = model.generate(**inputs, max_new_tokens=4)
    state, found = apply_sparsevlm(model, **OPTIONS), []
    worker = threading.Thread(target=lambda: found.append(model.generate(**inputs, max_new_tokens=4)))
    with state._session.turn():
        worker.start()
        worker.join(0.2)
        state._generate.detach()
        state._hooks.detach()
    worker.join(20)
    assert torch.equal(found[0], dense)


def test_removal_inside_of_the_own_request_is_refused():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)

    def inside(ids, scores):
        remove_sparsevlm(model)
        return scores

    with pytest.raises(RuntimeError, match="this model's own request is running"):
        model.generate(**inputs, max_new_tokens=2, logits_processor=[inside])
    assert state.attached
    remove_sparsevlm(model)


@pytest.mark.parametrize("asked_before", [False, True])
def test_a_report_is_of_the_request_that_to_thread_made(asked_before):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["two images"])
    state = apply_sparsevlm(model, **OPTIONS)
    if asked_before:
        model.generate(**inputs, max_new_tokens=1)

    async def ask(keep):
        with state.options(keep=keep):
            await asyncio.to_thread(lambda: model.generate(**inputs, max_new_tokens=1))
            await asyncio.sleep(0.01)
            inside = state.report.average_in
        return inside, state.report.average_in

    async def ask_all():
        return await asyncio.gather(*map(ask, (0.5, 0.7, 0.9)))

    for (inside, behind), keep in zip(asyncio.run(ask_all()), (0.5, 0.7, 0.9), strict=True):
        assert inside == behind == pytest.approx(keep * 34, abs=1.0)


def test_a_second_pass_of_a_call_has_no_report_of_its_own():
    """Guidance runs the model a second time, without the prompt."""
    model, inputs = tiny_model("llava"), make_inputs(*PROMPTS["one image"], family="llava")
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**inputs, max_new_tokens=3, guidance_scale=1.5)
    assert state.report.samples[0].n_visual == 16
    assert state.report.final_tokens < 16


def test_positions_are_handed_on_through_a_wrapper():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**inputs, max_new_tokens=2)
    remove_sparsevlm(model)
    ids, plain = inputs.pop("input_ids"), model.generate

    def wrapper(*args, **kwargs):
        return plain(*args, **kwargs)

    model.generate = wrapper
    apply_sparsevlm(model, **OPTIONS)
    assert torch.equal(model.generate(ids, **inputs, max_new_tokens=2), wanted)
