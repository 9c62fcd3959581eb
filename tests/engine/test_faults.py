"""What may go wrong around the engine: memory, weights that change, threads, many shapes, warm-up."""

from __future__ import annotations

import threading

import pytest
import torch
from test_parity import run
from transformers.generation.streamers import BaseStreamer

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.engine.fused_weights import FusedWeights
from sparsevlm.engine.text import decode_graph, prefill, prune_program, segments
from sparsevlm.engine.vision import program
from toys import PROMPTS, make_inputs, relative_error, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def full(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("where", ["prompt", "tower"])
def test_want_of_memory_is_the_plain_path(where, monkeypatch, caplog):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)
    wanted = model.generate(**inputs, **GREEDY)
    with state.options(engine=True):
        with monkeypatch.context() as patch:
            patch.setattr(
                *((prefill.Prefill, "run") if where == "prompt" else (program.VisionPrograms, "__call__")), full
            )
            with torch.inference_mode():
                assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
            assert not any(weight.is_inference() for weight in model.parameters())
            assert "out of memory" in caplog.text
            assert state.report.path == ("plain" if where == "prompt" else "engine")
            assert ("out of memory" in state.report.path_reason) == (where == "prompt")
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        assert state.report.path == "engine"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["weights", "programs"])
def test_what_is_broken_off_while_it_is_made_is_made_anew(where, error, monkeypatch):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = apply_sparsevlm(model, **OPTIONS)
    wanted, calls = model.generate(**inputs, **GREEDY), []
    place, name = {"weights": (FusedWeights, "_fuse"), "programs": (prefill.Prefill, "make_room")}[where]
    made = getattr(place, name)

    def breaks_off(*args, **kwargs):
        calls.append(made(*args, **kwargs))
        if len(calls) == (5 if where == "weights" else 1):
            raise error
        return calls[-1]

    with state.options(engine=True):
        monkeypatch.setattr(place, name, breaks_off)
        if isinstance(error, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs, **GREEDY)
        else:
            assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
            assert "out of memory" in state.report.path_reason
        storages = [weight.untyped_storage().data_ptr() for weight in model.parameters()]
        assert len(set(storages)) == len(storages)  # no weight lies beside another any more
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
        assert state.report.path == "engine"
    remove_sparsevlm(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_want_of_memory_for_a_new_token_leaves_the_next_answer_right(monkeypatch):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state, options = apply_sparsevlm(model, **OPTIONS), {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    monkeypatch.setattr(decode_graph, "_LEAST_CAPACITY", 2)
    monkeypatch.setattr(decode_graph, "_FIRST_CAPACITY", 2)
    begin, calls = decode_graph.begin_decode, []

    def wanting(*args, **kwargs):
        calls.append(1)
        return full() if len(calls) == 2 else begin(*args, **kwargs)

    with state.options(engine=True):
        with monkeypatch.context() as patch:
            patch.setattr(decode_graph, "begin_decode", wanting)
            with pytest.raises(torch.OutOfMemoryError):
                model.generate(**inputs, **options)
        assert state.report.failed
        assert torch.equal(model.generate(**inputs, **options), wanted)
        assert state.report.path == "engine"


def changed(model, kind):
    layer, block = model.model.language_model.layers[1], model.model.visual.blocks[-1]
    with torch.no_grad():
        if kind == "dtype":
            model.double()
        elif kind == "a weight elsewhere":
            layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data * 2.0
        elif kind == "a module":
            layer.self_attn.o_proj = torch.nn.Linear(*reversed(layer.self_attn.o_proj.weight.shape), bias=False)
        elif kind == "the tower":
            block.attn.proj.weight.data = block.attn.proj.weight.data * 2.0
        elif kind == "in place":
            layer.mlp.down_proj.weight.mul_(2.0)


@pytest.mark.parametrize("kind", ["dtype", "a weight elsewhere", "a module", "the tower", "in place"])
def test_a_model_that_changes_is_noticed(kind):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    _, before = run(model, inputs, 3)
    torch.manual_seed(0)
    changed(model, kind)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    said, found = run(model, inputs, 3)
    assert state.report.path == "engine"
    with state.options(engine=False):
        _, wanted = run(model, inputs, 3, said)
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-5
    if kind != "dtype":
        assert relative_error(found[0], before[0]) > 1e-3


class Pause(BaseStreamer):
    """Holds a call in the middle."""

    def __init__(self):
        self.begun, self.may_go_on, self.n = threading.Event(), threading.Event(), 0

    def put(self, value):
        self.n += 1
        if self.n == 2:
            self.begun.set()
            self.may_go_on.wait(20)

    def end(self):
        pass


def test_a_second_thread_waits_its_turn():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    wanted, pause, found = model.generate(**inputs, **GREEDY), Pause(), []
    worker = threading.Thread(target=lambda: found.append(model.generate(**inputs, **GREEDY, streamer=pause)))
    worker.start()
    assert pause.begun.wait(20)
    with state.options(timeout=0.05), pytest.raises(TimeoutError, match="another thread"):
        model.generate(**inputs, **GREEDY)
    threading.Timer(0.1, pause.may_go_on.set).start()
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    worker.join()
    assert torch.equal(found[0], wanted)


def test_many_shapes_do_not_pile_up(monkeypatch):
    for module in (segments, prune_program, program):
        monkeypatch.setattr(module, "_MOST_GRAPHS", 3)
    model = tiny_model()
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    for n in range(1, 13):
        model.generate(**make_inputs([("text", 3), ("image", 4, 2 * n), ("text", 5 * n)]), **GREEDY)
    runner = state._engine._runner
    assert max(len(runner.prefill.segments), len(runner.prefill.prune_programs), len(runner.vision)) <= 3


def test_warm_up_says_what_it_did():
    model = tiny_model()
    small, large = (make_inputs([("text", 3), ("image", 4, side), ("text", 9)]) for side in (4, 8))
    state = apply_sparsevlm(model, **OPTIONS, engine=True, warmup=[small, large])
    assert len(state._engine._runner.prefill.segments) == 2
    found = state.warmup(small, large, max_new_tokens=3)
    assert (found.n_run, found.n_left, found.n_bytes) == (2, 0, 0)
    assert found.seconds > 0
    found = state.warmup(small, large, seconds=0.0)
    assert (found.n_run, found.n_left) == (1, 1)
    assert state.report.samples[0].n_visual == 32  # the largest first
    assert state.report.decode_steps == 1


def test_on_a_cpu_the_plain_path_is_the_default():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**inputs, **GREEDY)
    assert state.report.path == "plain"
    assert state.report.path_reason == "hooks on the model's own modules"


@pytest.mark.gpu
def test_on_a_gpu_the_engine_is_the_default():
    model = tiny_model().cuda().half()
    inputs = {name: value.cuda() for name, value in make_inputs(*PROMPTS["one image"]).items()}
    state = apply_sparsevlm(model, **OPTIONS)
    model.generate(**inputs, **GREEDY)
    assert state.report.path == "engine"
    model.float()
    model.generate(**inputs, **GREEDY)
    assert "float32 on a GPU" in state.report.path_reason


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("selector", ["span", "random"])
def test_modes_of_torch_may_change_from_call_to_call(first, selector):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["batch, left padding"])
    state = apply_sparsevlm(model, **OPTIONS, selector=selector)
    wanted = model.generate(**inputs, **GREEDY)
    other = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    with state.options(engine=True):
        for mode in (first, other, first):
            with mode():
                assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
            assert state.report.path == "engine"
    assert not any(weight.is_inference() for weight in model.parameters())
    with state.options(engine=False):
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


def test_autocast_runs_on_the_plain_path():
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.generate(**inputs, **GREEDY)
        assert (state.report.path, "autocast" in state.report.path_reason) == ("plain", True)
        with state.options(engine=False):
            assert torch.equal(model.generate(**inputs, **GREEDY), found)
