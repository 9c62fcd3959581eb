"""The benchmark measures what it says, on a tiny model."""

from __future__ import annotations

import dataclasses
import gc
from types import SimpleNamespace

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.bench import agreement, shapes
from sparsevlm.bench.cases import N_TEXT, Case
from sparsevlm.bench.providers import make_providers, reset, shared_copy
from sparsevlm.bench.roofline import Roofline, roofline_bounds
from sparsevlm.bench.rounds import Measurement, Settings, measure
from sparsevlm.bench.rows import COLUMNS
from sparsevlm.bench.run import run
from sparsevlm.bench.timing import time_call
from sparsevlm.bench.workload import fresh_inputs
from sparsevlm.engine.text import decode_graph, prune_program
from sparsevlm.kernels.close_up import close_up
from sparsevlm.models import adapter_for
from toys import tiny_model

ORIGIN = {"commit": "abc", "model": "tiny", "command": "sparsevlm bench"}
SMALL = Case(100, 2, 4)


def test_inputs_are_fresh_and_what_the_model_takes():
    model = tiny_model(n_layers=12)
    generator = torch.Generator().manual_seed(0)
    first, second = (fresh_inputs(model, SMALL, generator) for _ in range(2))
    assert first["input_ids"].shape == (2, 100 + N_TEXT)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    state = apply_sparsevlm(model, keep=0.5)
    model.generate(**first, max_new_tokens=1)
    assert [sample.n_visual for sample in state.report.samples] == [100, 100]
    assert [sample.n_text for sample in state.report.samples] == [N_TEXT, N_TEXT]


def test_rows():
    model = tiny_model(n_layers=12)
    seen = []
    rows = run(
        model,
        [SMALL],
        Settings((0.5,), iterations=3, warmup=1, selectors=("sparsevlm", "random")),
        ORIGIN,
        lambda case, rows: seen.append((case, len(rows))),
    )
    assert seen == [(SMALL, len(rows))]
    assert all(tuple(row) == COLUMNS for row in rows)
    on_engine, on_hooks = ("ours-engine", "ours-vision"), ("ours-dense", "ours", "ours-sparsevlm", "ours-random")
    names = list(dict.fromkeys(row["provider"] for row in rows))
    assert names[:2] == ["hf-dense", "ours-default"], "the user's own call, next to transformers"
    assert set(names[2:]) == {*on_engine, *on_hooks}
    by = {(row["provider"], row["phase"], row["metric"]): row for row in rows}
    for provider in names:
        total, first = by[provider, "total", "ms"], by[provider, "first_token", "ms"]
        assert float(total["p20"]) <= float(total["p50"]) <= float(total["p80"])
        assert 0 < float(first["p50"]) < float(total["p50"])
        parts = sum(float(by[provider, phase, "ms"]["p50"]) for phase in ("vision", "prefill"))
        assert parts < float(total["p50"])
        assert total["path"] == ("dense" if provider == "hf-dense" else "engine" if provider in on_engine else "plain")
        assert total["note"] == "", "hooks are what such a call runs on"
        assert float(total["floor"]) > 0
    assert by["ours-engine", "total", "ms"]["selector"] == "span-features"
    for provider in ("ours", "ours-random", "ours-sparsevlm"):
        assert float(by[provider, "prefill", "ms"]["floor"]) < float(by["ours-dense", "prefill", "ms"]["floor"])
        assert by[provider, "total", "ms"]["selector"] == provider.removeprefix("ours-").replace(
            "ours", "span-features"
        )
    vision = [by[provider, "vision", "ms"] for provider in ("ours-vision", "ours")]
    assert [row["vision_keep"] for row in vision] == ["0.5", "1.0"]
    assert float(vision[0]["floor"]) <= float(vision[1]["floor"])
    assert by["ours-dense", "prefill", "ms"]["floor"] == by["hf-dense", "prefill", "ms"]["floor"]
    assert not any("forward" in vars(module) for module in (model.model.language_model, model.model.visual))


def test_every_step_is_told_before_it_is_done():
    told = []
    settings = Settings((0.5,), iterations=2, warmup=1, selectors=())
    rows = run(
        tiny_model(n_layers=12), [SMALL], settings, ORIGIN, on_step=lambda case, step, left: told.append((step, left))
    )
    steps = [step for step, _ in told]
    assert steps[0].stage == "comparing answers"
    names = list(dict.fromkeys(row["provider"] for row in rows))
    assert [step.provider for step in steps if step.begins] == names
    assert all((step.number, step.of) == (names.index(step.provider) + 1, len(names)) for step in steps[1:])
    for n in (1, 2):
        assert [step.provider for step in steps if step.stage == f"timed call {n}"] == names
    left = [step.seconds_left for step in steps if step.stage.startswith("timed call")]
    assert all(seconds > 0.0 for seconds in left)
    assert left[-1] < left[0], "less is left in the end"
    assert all(step.seconds_left > 0.0 and left.startswith("about ") for step, left in told), "up to the last call"


def test_a_path_that_is_not_the_engines_is_void():
    model = tiny_model(n_layers=12)
    model.model.language_model.layers[3].mlp.register_forward_hook(lambda *_: None)
    rows = run(model, [SMALL], Settings((0.5,), iterations=1, warmup=1), ORIGIN)
    void = [row for row in rows if row["provider"] in ("ours-engine", "ours-vision")]
    assert len(void) == 2
    assert all(row["p50"] and not row["note"] for row in rows if row not in void and row["metric"] == "ms")
    assert all(row["note"].startswith("void: ") and row["p50"] == "" for row in void)


def test_what_runs_on_the_engine_is_what_a_call_would_run_on_it():
    """And where nothing does, nothing is compared with it."""
    providers = make_providers(tiny_model(n_layers=12), (0.5,), static=False, vision_keep=0.5, selectors=["random"])
    assert [one.name for one in providers if one.wants_engine] == ["ours-engine", "ours-vision"]
    assert all(one.config is None or one.config.engine is None for one in providers if not one.wants_engine)
    on_gpu = [dataclasses.replace(one, model=SimpleNamespace(device=torch.device("cuda"))) for one in providers]
    assert [one.name for one in on_gpu if not one.wants_engine] == ["hf-dense"]
    model = tiny_model(n_layers=12)
    inputs = fresh_inputs(model, SMALL, torch.Generator().manual_seed(0))
    on_hooks = [one for one in make_providers(model, (0.5,), static=False) if not one.wants_engine]
    model.lm_head = torch.nn.Linear(64, 96, bias=False)
    agreement.check(on_hooks, inputs, SMALL.new_tokens)


def test_float8_weights_are_measured_where_they_are_read():
    model, case = tiny_model(n_layers=12), Case(64, 1, 2)
    (float8,) = [one for one in make_providers(model, (0.5,), static=False, fp8=True) if one.name == "ours-fp8"]
    assert float8.supports(case)
    assert not any(float8.supports(other) for other in (Case(64, 1, 1), Case(64, 17, 2)))
    assert not any(one.name == "ours-fp8" for one in make_providers(tiny_model(n_layers=12), (0.5,), static=False))
    rows = run(tiny_model(n_layers=12), [case], Settings((0.5,), 1.0, 0.1, 1, 1, selectors=(), fp8=True), ORIGIN)
    found = {row["phase"]: row["p50"] for row in rows if row["provider"] == "ours-fp8" and row["metric"] == "ms"}
    assert found["first_token"]
    assert found["decode_per_token"]
    said = []
    run(
        tiny_model(n_layers=12),
        [Case(64, 1, 1)],
        Settings((0.5,), 1.0, 0.1, 1, 1, selectors=(), fp8=True),
        ORIGIN,
        say=said.append,
    )
    assert "ours-fp8: left out; it is measured in none of these cases" in said


def test_wrong_answers_are_not_timed(monkeypatch):
    model = tiny_model(n_layers=12)
    providers = make_providers(model, (0.5,), static=False)
    inputs = fresh_inputs(model, SMALL, torch.Generator().manual_seed(0))
    agreement.check(providers, inputs, SMALL.new_tokens)
    model.lm_head = torch.nn.Linear(64, 96, bias=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="logits of token 1 differ"):
        agreement.check(providers, inputs, SMALL.new_tokens)


def test_a_case_that_is_not_right_is_a_row(monkeypatch):
    check = agreement.check

    def fail_once(providers, inputs, new_tokens):
        monkeypatch.setattr(agreement, "check", check)
        raise agreement.DisagreementError("they differ.")

    monkeypatch.setattr(agreement, "check", fail_once)
    rows = run(tiny_model(n_layers=12), [SMALL, SMALL], Settings((0.5,), iterations=1, warmup=1), ORIGIN)
    wrong = [row for row in rows if row["note"] == "not timed: they differ."]
    assert len(wrong) == 8
    assert all(row["p50"] == "" for row in wrong)
    assert all(row["p50"] for row in rows if row not in wrong and row["metric"] == "ms")


def test_wrong_further_tokens_are_not_timed(monkeypatch):
    """The first token comes from the prompt, the others from the decode step."""
    model = tiny_model(n_layers=12)
    providers = make_providers(model, (0.5,), static=False)
    inputs = fresh_inputs(model, SMALL, torch.Generator().manual_seed(0))
    step = decode_graph.decode_step
    monkeypatch.setattr(decode_graph, "decode_step", lambda *arguments: step(*arguments).flip(-1))
    with pytest.raises(RuntimeError, match="logits of token 2 differ"):
        agreement.check(providers, inputs, SMALL.new_tokens)


def test_other_tokens_kept_are_not_timed(monkeypatch):
    model = tiny_model(n_layers=12)
    providers = make_providers(model, (0.5,), static=False)
    inputs = fresh_inputs(model, SMALL, torch.Generator().manual_seed(0))

    def others(packed, is_kept, n_keep, most):
        dropped = ~is_kept & (torch.arange(is_kept.shape[1]) < packed.n_visual[:, None])
        return close_up(packed, dropped & (dropped.cumsum(dim=1) <= n_keep[:, None]), n_keep, most)

    monkeypatch.setattr(prune_program, "close_up", others)
    with pytest.raises(RuntimeError, match="that the plain path keeps, the engine keeps"):
        agreement.check(providers, inputs, SMALL.new_tokens)


def test_want_of_memory_is_a_row(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(agreement, "check", fail)
    rows = run(tiny_model(n_layers=12), [SMALL, SMALL], Settings((0.5,), iterations=1, warmup=1), ORIGIN)
    assert len(rows) == 16
    assert all(row["note"].startswith("out of memory") and row["p50"] == "" for row in rows)


def test_a_shared_copy_has_the_weights_of_its_model():
    model = tiny_model()
    copied = shared_copy(model)
    assert copied.lm_head is not model.lm_head
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))


def test_phases_add_up():
    model = tiny_model(n_layers=12)
    inputs = fresh_inputs(model, Case(100, 1, 3), torch.Generator().manual_seed(0))
    for provider in make_providers(model, (0.5,), static=False):
        found = time_call(provider, inputs, 3)
        assert found["first_token"] == pytest.approx(found["vision"] + found["prefill"] + found["overhead"])
        assert found["total"] >= found["first_token"] + 2 * found["decode_per_token"]
        assert all(found[phase] > 0 for phase in found)
        assert "decode_per_token" not in time_call(provider, inputs, 1)
        parts = (provider.model, provider.model.model.visual, provider.model.model.language_model)
        assert not any(module._forward_hooks for module in parts if provider.state is None)


def test_a_call_that_was_for_the_engine_has_no_phases_on_hooks():
    model = tiny_model(n_layers=12)
    model.model.language_model.layers[3].mlp.register_forward_hook(lambda *_: None)
    inputs = fresh_inputs(model, Case(100, 1, 3), torch.Generator().manual_seed(0))
    (ours,) = [one for one in make_providers(model, (0.5,), static=False) if one.wants_engine]
    assert set(time_call(ours, inputs, 3)) == {"first_token", "total", "decode_per_token"}


def test_nothing_is_hooked_once_the_first_token_is_there():
    """What is compiled for further tokens must not see hooks, or it would be compiled anew in every call."""
    model = tiny_model()
    inputs = fresh_inputs(model, Case(36, 1, 4), torch.Generator().manual_seed(0))
    hooked = []
    step = model.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        hooked.append(bool(model.model.language_model._forward_hooks))
        return step(*args, **kwargs)

    model.prepare_inputs_for_generation = prepare
    time_call(make_providers(model, (), static=False)[0], inputs, 4)
    assert hooked == [True, False, False, False]


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_in_a_timed_call(collects):
    model = tiny_model()
    inputs = fresh_inputs(model, Case(36, 1, 2), torch.Generator().manual_seed(0))
    seen = []
    prepare = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = lambda *args, **kwargs: (
        seen.append(gc.isenabled()) or prepare(*args, **kwargs)
    )
    try:
        if not collects:
            gc.disable()
        time_call(make_providers(model, (), static=False)[0], inputs, 2)
        assert gc.isenabled() == collects
    finally:
        gc.enable()
    assert seen == [False, False]


def test_a_provider_that_has_had_its_time_is_done():
    settings = Settings(seconds=8.0, iterations=10, warmup=3)
    slow, fast = Measurement(), Measurement()
    slow.warmup(2.5)
    fast.warmup(0.1)
    assert slow.is_warm(settings)
    assert not fast.is_warm(settings)
    for n in range(1, 11):
        assert not fast.is_done(settings)
        assert slow.is_done(settings) == (n > 3)
        slow.add({}, 4.0)
        fast.add({}, 0.1)
    assert fast.is_done(settings)


def test_a_reset_engine_begins_anew():
    model = tiny_model(n_layers=12)
    ours = next(provider for provider in make_providers(model, (0.5,), static=False) if provider.name == "ours-engine")
    inputs = fresh_inputs(model, SMALL, torch.Generator().manual_seed(0))
    before = ours.generate(inputs, 4)
    reset([ours])
    assert torch.equal(ours.generate(inputs, 4), before)
    assert ours.state.report.path == "engine"


def test_compiled_decoding_is_measured_where_one_sample_decodes():
    providers = make_providers(tiny_model(n_layers=12), (), static=True)
    static = next(provider for provider in providers if provider.name == "hf-static")
    supported = [static.supports(case) for case in (Case(256, 1, 64), Case(256, 1, 1), Case(256, 32, 64))]
    assert supported == [True, False, False]
    assert all(provider.supports(Case(256, 32, 1)) for provider in providers if provider is not static)


def test_what_may_fail_is_a_row_if_it_does():
    def fail(*args, **options):
        raise ImportError("no compiler")

    model = tiny_model(n_layers=12)
    providers = make_providers(model, (0.5,), static=True)
    broken = [dataclasses.replace(each, generate=fail) if each.compiles else each for each in providers]
    inputs = fresh_inputs(model, Case(100, 1, 2), torch.Generator().manual_seed(0))
    settings = Settings((0.5,), iterations=1, warmup=1)
    found = measure(Case(100, 1, 2), broken, settings, lambda: lambda _: inputs)
    notes = {provider.name: one.note for provider, one in found.items()}
    assert notes.pop("hf-static") == "failed: ImportError"
    assert set(notes.values()) == {""}
    broken[0] = dataclasses.replace(broken[0], generate=fail)
    with pytest.raises(ImportError):
        measure(Case(100, 1, 2), broken, settings, lambda: lambda _: inputs)


def test_roofline_bounds_of_the_7b_shape():
    """As worked out once by hand: 5.5 TFLOP for the tower and 14.1 GB for a token at 1024 visual tokens."""
    with torch.device("meta"):
        model = shapes.empty_model("7b", torch.bfloat16, "sdpa")
    dense = roofline_bounds(adapter_for(model), Case(1024, 1, 2), [1024.0] * 28, Roofline(773e12, 4.15e12))
    assert dense["vision"] == pytest.approx(7.3, rel=0.06)
    assert dense["prefill"] == pytest.approx(18.3, rel=0.05)
    assert dense["decode_per_token"] == pytest.approx(3.4, rel=0.02)
    pruned = roofline_bounds(
        adapter_for(model), Case(1024, 1, 2), [1024.0] * 3 + [164.0] * 25, Roofline(773e12, 4.15e12)
    )
    assert pruned["vision"] + pruned["prefill"] == pytest.approx(12.6, rel=0.05)


def test_random_weights_work():
    model = shapes.random_model("tiny", "cpu", torch.float32, "sdpa")
    inputs = fresh_inputs(model, Case(36, 1, 3), torch.Generator().manual_seed(0))
    logits = model(**inputs).logits
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0
    assert len(shapes.random_model("tiny", "cpu", torch.float32, "sdpa", layers=3).model.language_model.layers) == 3
    with pytest.raises(ValueError, match="there is no shape '13b'"):
        shapes.random_model("13b", "cpu", torch.float32, "sdpa")


def test_words_are_no_image_tokens():
    model = tiny_model()
    config = model.config
    special = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        ids = fresh_inputs(model, SMALL, generator)["input_ids"][0].tolist()
        start = ids.index(config.vision_start_token_id)
        end = start + SMALL.n_visual + 1
        assert ids[start + 1 : end] == [config.image_token_id] * SMALL.n_visual
        words = ids[:start] + ids[end + 1 :]
        assert not special & set(words)
        seen |= set(words)
    assert len(seen) == config.text_config.vocab_size - len(special)
