"""The ladder of a warm-up covers requests that it has not seen."""

from __future__ import annotations

import random

import pytest
import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.engine.capacities import capacities, row_capacity
from sparsevlm.selection.selectors.span_features import SpanFeaturesSelector
from sparsevlm.warmup import ladder, warmup
from toys import make_inputs, tiny_model

MOST = 300


def n_programs(runner):
    """Those that take long to record: of the tower, of segments, of decode steps."""
    return [len(kind) for kind in (runner.vision, runner.prefill.segments, runner.decode_graphs)]


OPTIONS = [
    {},
    {"keep": 0.5},
    {"selector": SpanFeaturesSelector(unexplained=0.2, most=0.9)},
    {"target_layers": [0, 2]},
    {"keep": 0.5, "target_layers": [0, 2]},
    {"keep": 0.5, "target_layers": [0, 2], "selector": "sparsevlm"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_requests_of_other_sizes_need_nothing_new(options):
    model = tiny_model()
    state = apply_sparsevlm(model, **options, engine=True)
    of_requests = state._session.options
    rungs = ladder(state.adapter, MOST, of_requests.reads_text, of_requests.is_free)
    found = warmup(model, rungs, 4, 600.0, 0.9)
    assert (found.n_left, found.n_run) == (0, len(rungs))
    assert state.report.path == "engine"
    runner = state._engine._runner
    before, space = n_programs(runner), runner.prefill.space
    n_small = [len(kind) for kind in (runner.prefill.prompts, runner.prefill.prune_programs)]
    draw = random.Random(0)
    for _ in range(40):
        height, width = draw.randint(6, 17), draw.randint(6, 17)
        inputs = make_inputs([("text", 10), ("image", height, width), ("text", draw.randint(20, 180))])
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert runner.prefill.space is space
    assert n_programs(runner) == before
    grown = [len(kind) for kind in (runner.prefill.prompts, runner.prefill.prune_programs)]
    if (
        options.get("selector") != "sparsevlm"
    ):  # else a step's text and budget combine in more ways than the ladder tries
        assert sum(grown) <= sum(n_small) + 2


@pytest.mark.parametrize("family", ["internvl", "llava_next", "mistral3"])
def test_other_numbers_of_tiles_need_nothing_new(family):
    model = tiny_model(family)
    state = apply_sparsevlm(model, keep=0.5, target_layers=[0, 2], engine=True)
    assert warmup(model, ladder(state.adapter, 90, False), 4, 600.0, 0.9).n_left == 0
    if family == "mistral3":  # of exact sizes, of which a ladder has too few
        return
    captured = state._engine._runner.captured
    before = len(captured)
    assert before == (2 * 14 if family == "internvl" else 2 * 2)
    draw = random.Random(0)
    for _ in range(12):
        inputs = state.adapter.family.example(state.adapter, (1, 1, draw.randint(1, 90)), 24)
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(captured) == before


def test_without_a_gpu_there_is_nothing_to_run_ahead():
    state = apply_sparsevlm(tiny_model(), keep=0.5, target_layers=[0, 2], engine=True, warmup=True)
    assert state.warmup().n_run == 0
    with pytest.raises(ValueError, match="most_visual must be at least 1"):
        state.warmup(most_visual=0)


def test_capacities_are_those_of_all_numbers():
    assert sorted({row_capacity(n) for n in range(1, 5000)}) == list(capacities(4999))


EXAMPLES = {
    "qwen3_vl": (54, ((1, 6, 9),)),
    "llava": (16, ((1, 4, 4),)),
    "llava_next": (51, ()),  # the tiles as one picture, whose rows a newline ends
    "llava_onevision": (51, ()),
    "internvl": (56, ((14, 2, 2),)),
    "deepseek_vl": (9, ((1, 3, 3),)),
    "mistral3": (49, ((1, 7, 7),)),
    "lighton_ocr": (49, ((1, 7, 7),)),
}


@pytest.mark.parametrize("family", EXAMPLES)
def test_examples_of_other_families(family):
    model = tiny_model(family)
    state = apply_sparsevlm(model, keep=0.5, target_layers=[0, 2], engine=True)
    adapter, (n_visual, grids) = state.adapter, EXAMPLES[family]
    inputs = adapter.family.example(adapter, (1, 6, 9), 24)
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=2)
    (sample,) = state.report.samples
    assert state.report.path == "engine"
    assert sample.grids == grids
    n_newlines = 6 if family in ("llava_next", "llava_onevision") else 0
    assert (sample.n_visual + n_newlines, sample.n_text - n_newlines) == (n_visual, 24)
    sizes = [rung.size for rung in ladder(adapter, MOST, True)]
    assert min(sizes) < MOST
    assert set(sizes) == {adapter.family.example_size(adapter, size) for size in sizes}


@pytest.mark.parametrize("family", ["smolvlm", "gemma3", "gemma4", "minicpmv4_6"])
def test_families_without_examples_say_what_to_do(family):
    state = apply_sparsevlm(tiny_model(family), keep=0.5)
    with pytest.raises(NotImplementedError, match="name typical inputs of generate"):
        state.adapter.family.example(state.adapter, (1, 6, 9), 24)


def test_an_example_is_what_the_model_takes():
    model = tiny_model()
    state = apply_sparsevlm(model, keep=0.5, target_layers=[0, 2])
    inputs = state.adapter.family.example(state.adapter, (1, 6, 9), 24)
    assert all(value.device == model.device for value in inputs.values())
    with torch.no_grad():
        model.generate(**inputs, max_new_tokens=1)
    (sample,) = state.report.samples
    assert (sample.n_visual, sample.n_text, sample.grids) == (54, 24, ((1, 6, 9),))
