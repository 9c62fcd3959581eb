"""Requests that fail: their report says so, and why, in its text, its JSON and in sums."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation import BaseStreamer

from sparsevlm import Report, ReportTotal, apply_sparsevlm
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"keep": 0.7, "min_keep": 3, "target_layers": [1, 3]}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
PATHS = pytest.mark.parametrize(("engine", "path"), [(False, "plain"), (True, "engine")])
ERRORS = pytest.mark.parametrize(
    ("error", "said"), [(ValueError("too late"), "ValueError: too late"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)


class Fuse:
    """Raises at the n-th call."""

    def __init__(self, error=None, at=0):
        self.error, self.at, self.n = error, at, 0

    def burn(self):
        self.n += 1
        if self.n == self.at:
            raise self.error


class FusedProcessor(Fuse, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.burn()
        return scores


class FusedStreamer(Fuse, BaseStreamer):
    def put(self, value):
        self.burn()

    def end(self):
        pass


class FusedSelector(Fuse):
    def select(self, context, n_keep):
        self.burn()
        return torch.arange(n_keep)


def fails(model, inputs, error, **more):
    with pytest.raises(type(error)) as caught:
        model.generate(**inputs, **GREEDY, **more)
    assert caught.value is error


def check(report, said):
    """What every failed report says wherever it is read."""
    assert report.failed == said
    assert str(report).startswith(f"failed: {said}\nas far as it came:\n")
    assert ("the prompt was not finished" in str(report)) != report.prompt_finished
    assert ("at the end" in str(report)) == report.prompt_finished
    assert json.loads(report.to_json())["failed"] == said
    assert Report.from_dict(report.to_dict()) == report


@PATHS
@ERRORS
@pytest.mark.parametrize("steps", [0, 2])
def test_in_a_logits_processor(engine, path, error, said, steps):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    wanted = model.generate(**inputs, **GREEDY)
    before = state.report
    fails(model, inputs, error, logits_processor=[FusedProcessor(error, steps + 1)])
    check(state.report, said)
    assert (state.report.path, state.report.decode_steps) == (path, steps)
    assert state.report.samples == before.samples
    assert state.report.flops == before.flops
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    assert state.report.failed is None
    assert "failed" not in str(state.report)


@PATHS
@ERRORS
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_in_a_selector(engine, path, error, said, at):
    """For either sample, at either target layer: what the prompt would have cost is not known."""
    error = type(error)(*error.args)  # which gets notes
    if isinstance(error, Exception):
        said += f" (in selector 'FusedSelector' at target layer {OPTIONS['target_layers'][(at - 1) // 2]})"
    model, selector = tiny_model(), FusedSelector(error, at)
    inputs = make_inputs(*PROMPTS["one image"], [("text", 2), ("image", 3, 5), ("text", 4)])
    state = apply_sparsevlm(model, **OPTIONS, engine=engine, selector=selector)
    fails(model, inputs, error)
    check(state.report, said)
    assert state.report.path == path
    assert [len(sample.stages) for sample in state.report.samples] == [at // 2, (at - 1) // 2]
    assert (state.report.flops.dense, state.report.flops.sparse, state.report.kv_bytes.sparse) == (0, 0, 0)
    assert (state.report.prompt_finished, state.report.final_tokens) == (False, 0)
    target = OPTIONS["target_layers"][(at - 1) // 2]
    assert [row["layer"] for row in state.report.layer_rows()] == [*range(target)]
    model.generate(**inputs, **GREEDY)
    assert state.report.failed is None
    assert state.report.flops.sparse > 0


@PATHS
@ERRORS
@pytest.mark.parametrize("at", [1, 2, 3])
def test_in_a_streamer(engine, path, error, said, at):
    """The first that it gets is the prompt, before anything runs."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    wanted = model.generate(**inputs, **GREEDY)
    fails(model, inputs, error, streamer=FusedStreamer(error, at))
    check(state.report, said)
    assert state.report.path == ("none" if at == 1 else path)
    assert len(state.report.samples) == (at > 1)
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    assert state.report.failed is None


@PATHS
def test_in_the_arguments(engine, path):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=engine)
    model.generate(**inputs, **GREEDY)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**inputs, **GREEDY, nonsense=1)
    assert state.report.failed.startswith("ValueError: ")
    assert (state.report.path, state.report.path_reason) == ("none", "ended before its first pass")


def test_in_a_direct_call():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    selector = FusedSelector(RuntimeError("no choice"), 2)
    state = apply_sparsevlm(model, **OPTIONS, selector=selector)
    with pytest.raises(RuntimeError, match="no choice"):
        model(**inputs)
    check(
        state.report,
        f"RuntimeError: no choice (in selector 'FusedSelector' at target layer {OPTIONS['target_layers'][1]})",
    )
    model(**inputs)
    assert state.report.failed is None


@pytest.mark.parametrize("call", ["generate", "__call__"])
def test_a_call_that_gets_no_turn(call):
    """Its report is that of its thread; the call that runs goes on as if nothing had happened."""
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state, found = apply_sparsevlm(model, **OPTIONS), []
    wanted = model.generate(**inputs, **GREEDY)
    before = state.report
    begun, may_go_on = threading.Event(), threading.Event()

    class Pause(LogitsProcessor):
        def __call__(self, input_ids, scores):
            begun.set()
            may_go_on.wait(20)
            return scores

    def run():
        found.extend([model.generate(**inputs, **GREEDY, logits_processor=[Pause()]), state.report])

    worker = threading.Thread(target=run)
    worker.start()
    assert begun.wait(20)
    with state.options(timeout=0.05), pytest.raises(TimeoutError, match="another thread"):
        getattr(model, call)(**inputs)
    assert state.report.failed.startswith("TimeoutError: another thread")
    may_go_on.set()
    worker.join()
    assert torch.equal(found[0], wanted)
    assert (found[1].failed, found[1].decode_steps, found[1].samples) == (None, 3, before.samples)


def test_a_new_request_in_the_place_of_an_old_one_has_its_own_report(monkeypatch):
    """Requests that are gone leave their address to others."""
    monkeypatch.setattr("sparsevlm.state.id", lambda _: 1, raising=False)
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**make_inputs([("text", 3), ("image", 4, 6), ("text", 4)]), **GREEDY)
    assert state.report.n_visual == 24
    model.generate(**make_inputs([("text", 3), ("image", 3, 5), ("text", 4)]), **GREEDY)
    assert state.report.n_visual == 15


def test_sums_count_failures_apart():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**inputs, **GREEDY)
    good, error = state.report, RuntimeError("no more")
    fails(model, inputs, error, logits_processor=[FusedProcessor(error, 2)])
    total = sum([good, state.report, good])
    assert (total.n_requests, total.n_failed, total.n_samples) == (3, 1, 2)
    assert total.average_in == good.average_in
    assert (total.flops, total.decode_steps) == (good.flops + good.flops, 2 * good.decode_steps)
    assert total.wall_ms == (good + good).wall_ms
    assert total.to_dict()["n_failed"] == 1
    assert ReportTotal.of([good, state.report, good]) == total
    assert ReportTotal.of([]).n_requests == 0
    assert ReportTotal.of(iter([total, good])) == total + good


def test_visual_tokens_have_the_same_name_and_meaning_in_a_report_and_in_a_total():
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**make_inputs(*PROMPTS["one image"]), **GREEDY)
    report = state.report
    total = ReportTotal.of([report, report, report])
    for name in ("n_visual", "average_in", "average_out", "final_tokens"):
        assert getattr(total, name) == pytest.approx(getattr(report, name))
        assert total.to_dict()[name] == pytest.approx(report.to_dict()[name])
    assert (total.n_visual_sum, total.final_tokens_sum) == (3 * report.n_visual, 3 * report.final_tokens)
    assert ReportTotal.of([]).n_visual == 0.0


def test_a_report_of_an_older_release_did_not_fail():
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**make_inputs(*PROMPTS["one image"]), **GREEDY)
    data = state.report.to_dict()
    for name in ("failed", "prompt_finished", "past_kv_bytes"):
        del data[name]
    assert Report.from_dict(data) == state.report
