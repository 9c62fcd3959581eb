"""Shapes of several families: published dimensions, the inputs of their cases, and a run of a tiny one of each."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch

from sparsevlm.bench import shapes
from sparsevlm.bench.cases import FULL, Case, MixedCase, PictureCase
from sparsevlm.bench.fitting import fitted_cases
from sparsevlm.bench.roofline import Roofline, roofline_bounds, weights_of
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.run import run
from sparsevlm.bench.workload import fitted, fresh_inputs, images_of
from sparsevlm.models import adapter_for
from toys import tiny_model

# Billions of parameters, as published with the checkpoints.
PUBLISHED = {"7b": 8.29, "3b": 3.75, "qwen3-vl-8b": 8.77, "llava-1.5-7b": 7.06, "internvl3-8b": 7.94}
TINY = ("tiny", "qwen3-vl-tiny", "llava-tiny", "internvl-tiny")
PEAKS = Roofline(773e12, 4.15e12)
ORIGIN = {"commit": "abc", "model": "tiny", "command": "sparsevlm bench"}


def empty(shape):
    with torch.device("meta"):
        return shapes.empty_model(shape, torch.bfloat16, "sdpa")


@functools.cache
def small(shape):
    """A model of few layers with weights, which no test changes."""
    return shapes.random_model(shape, "cpu", torch.float32, "sdpa", layers=6)


@pytest.fixture(scope="module")
def adapters():
    """Adapters of all shapes, without weights."""
    return {shape: adapter_for(empty(shape)) for shape in shapes.SHAPES}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_shape_has_the_parameters_of_its_checkpoint(shape, adapters):
    adapter = adapters[shape]
    n_parameters = sum(weight.numel() for weight in adapter.model.parameters())
    assert n_parameters / 1e9 == pytest.approx(PUBLISHED[shape], abs=0.006)
    assert sum(weights_of(adapter).values()) == pytest.approx(n_parameters, rel=0.01)
    assert adapter.decoder.block is not None, adapter.decoder.undescribed  # the engine runs it


def test_all_shapes_are_known(adapters):
    assert set(shapes.SHAPES) == {*PUBLISHED, *TINY}
    assert adapters["internvl3-8b"].decoder.most_positions == 32768  # its dynamic positions scale nothing up to there
    assert shapes.shape_label("7b") == "7b shape, random weights"


@pytest.mark.parametrize("shape", TINY)
def test_random_weights_and_buffers(shape):
    model = small(shape)
    assert all(bool(weight.isfinite().all()) for weight in model.parameters())
    config = copy.deepcopy(model.config)
    config.get_text_config().update({"vocab_size": 8, "pad_token_id": None})  # no buffer depends on it
    made = type(model)._from_config(config)  # with its buffers as transformers computes them
    buffers = dict(made.named_buffers())
    assert len(buffers) > 0
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    norms = [(name, weight) for name, weight in model.named_parameters() if "norm" in name]
    assert all(weight.unique().tolist() == [float(name.endswith("weight"))] for name, weight in norms)


TRUE_NUMBERS = {
    "qwen3-vl-8b": {256: 256, 576: 576, 1024: 1024, 2048: 2048, 4096: 4096, 16384: 16384},
    "llava-1.5-7b": {256: 576, 576: 576, 1024: 1152, 2048: 2304, 4096: 4032, 16384: 16128},
    "internvl3-8b": {256: 256, 576: 512, 1024: 1024, 2048: 2048, 4096: 4096, 16384: 16384},
}


@pytest.mark.parametrize("shape", TRUE_NUMBERS)
def test_cases_have_the_nearest_number_of_visual_tokens(shape, adapters):
    adapter = adapters[shape]
    for asked, true in TRUE_NUMBERS[shape].items():
        case = fitted(adapter, Case(asked, 2, 64))
        assert (case.n_visual, case.name) == (true, f"v{true}-b2-n64")
        assert fitted(adapter, case) == case
        assert sum(image.n_visual for image in images_of(adapter, case)) == true
    numbers = {fitted(adapter, Case(n, 1, 1)).n_visual for n in range(200, 4300, 37)}
    assert all(fitted(adapter, Case(n, 1, 1)).n_visual == n for n in numbers)


def test_tiles_are_those_of_images_that_a_processor_makes(adapters):
    """1 to 12 tiles, and from two on the image as a whole."""
    tiles = {
        n: [image.n_tiles for image in images_of(adapters["internvl3-8b"], Case(256 * n, 1, 1))] for n in range(1, 65)
    }
    assert (tiles[1], tiles[2], tiles[3], tiles[13]) == ([1], [1, 1], [3], [13])
    assert (tiles[14], tiles[16], tiles[28]) == ([7, 7], [8, 8], [10, 9, 9])
    for n, of_images in tiles.items():
        assert sum(of_images) == n
        assert all(one == 1 or 3 <= one <= 13 for one in of_images)


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("asked", [Case(256, 2, 1), Case(2048, 1, 1), Case(576, 3, 1, n_text=60)])
def test_inputs_hold_what_their_case_says(shape, asked, adapters):
    adapter = adapters[shape]
    case, images = fitted(adapter, asked), images_of(adapter, asked)
    model = small(shape)
    first, second = (fresh_inputs(model, case, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ids, token = first["input_ids"], adapter.modalities["image"].token_id
    assert ids.shape == (case.batch, case.n_visual + case.n_text)
    assert (ids == token).sum(dim=1).tolist() == [case.n_visual] * case.batch
    runs = [len(run) for run in re.findall("v+", "".join("v" if one == token else "t" for one in ids[0].tolist()))]
    assert runs == [image.n_visual for image in images]
    assert first["pixel_values"].shape[0] == case.batch * sum(image.pixels[0] for image in images)
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(ids, second["input_ids"])
    assert case.batch == 1 or not torch.equal(ids[0], ids[1])
    assert 0 <= int(ids.min()) <= int(ids.max()) < model.config.get_text_config().vocab_size


SMALL = {
    "qwen3-vl-tiny": (Case(64, 2, 2), 64),
    "llava-tiny": (Case(1024, 1, 2), 1152),
    "internvl-tiny": (Case(300, 2, 2), 256),
}


@pytest.mark.parametrize("shape", SMALL)
def test_a_run_of_each_family(shape):
    model = small(shape)
    (case, n_visual), said = SMALL[shape], []
    settings = Settings((0.5,), vision_keep=0.5, iterations=1, warmup=1, selectors=())
    cases = [case, PictureCase(448)] + [MixedCase(24)] * (shape != "qwen3-vl-tiny")
    rows = run(model, cases, settings, ORIGIN, say=said.append)
    assert {row["case"] for row in rows} == {f"v{n_visual}-b{case.batch}-n2"}
    assert {row["n_visual"] for row in rows} == {str(n_visual)}
    has_program = shape == "qwen3-vl-tiny"
    providers = {"hf-dense", "ours-default", "ours-dense", "ours", "ours-engine", *["ours-vision"] * has_program}
    assert {row["provider"] for row in rows} == providers
    assert all(row["p50"] for row in rows)
    by = {(row["provider"], row["phase"]): row for row in rows if row["metric"] == "ms"}
    paths = {"hf-dense": "dense", "ours-engine": "engine"}
    for provider in ("hf-dense", "ours-default", "ours-dense", "ours", "ours-engine"):
        times = {phase: float(by[provider, phase]["p50"]) for phase in ("vision", "prefill", "first_token", "total")}
        assert min(times.values()) > 0.01, "of the tower as well"
        assert times["first_token"] < times["total"]
        assert all(float(by[provider, phase]["floor"]) > 0 for phase in times)
        assert by[provider, "total"]["path"] == paths.get(provider, "plain")
    assert any(
        line.startswith("picture448-b1-n1: left out; pictures take a processor, which comes with") for line in said
    )
    assert has_program != any(line.startswith("ours-vision: left out; the vision tower of a") for line in said)
    assert (shape == "qwen3-vl-tiny") != any(line.startswith("mixed24: left out; images of a") for line in said)


def test_what_is_changed_or_left_out_is_said(adapters):
    said = []
    cases = (Case(256, 1, 1), Case(576, 1, 1), Case(1024, 1, 1), Case(1152, 1, 1), Case(576, 1, 64))
    found = fitted_cases(adapters["llava-1.5-7b"], cases, 0, said.append, has_processor=False)
    assert [case.name for case in found] == ["v576-b1-n1", "v1152-b1-n1", "v576-b1-n64"]
    assert said[0].startswith("v256-b1-n1: as v576-b1-n1, the nearest number of visual tokens")
    assert said[1] == "v576-b1-n1: left out; v576-b1-n1 is measured already"
    assert [line.partition(":")[0] for line in said] == ["v256-b1-n1", "v576-b1-n1", "v1024-b1-n1", "v1152-b1-n1"]
    for shape in ("7b", "qwen3-vl-8b"):
        said.clear()
        equal = [case for case in FULL if not isinstance(case, PictureCase)]
        assert fitted_cases(adapters[shape], equal, 0, said.append, has_processor=False) == tuple(equal)
        assert said == []
    assert fitted_cases(adapters["7b"], FULL, 0, said.append, has_processor=False) == FULL
    with pytest.raises(ValueError, match="none of these cases can be measured: picture896-b1-n1, mixed24"):
        fitted_cases(adapters["llava-1.5-7b"], (PictureCase(896), MixedCase(24)), 0, said.append, has_processor=False)


def test_families_without_blank_images():
    adapter, said = adapter_for(tiny_model("smolvlm")), []
    cases = (Case(100, 1, 1), MixedCase(24), PictureCase(448))
    assert fitted_cases(adapter, cases, 0, said.append, has_processor=True) == cases[2:]
    assert [line.partition(":")[0] for line in said] == ["v100-b1-n1", "mixed24"]
    assert said[0].endswith(
        "; images of a SmolVLMForConditionalGeneration are not made in code, only those of "
        "families with examples for the warm-up"
    )
    with pytest.raises(ValueError, match=r"v100-b1-n1; images of a SmolVLM.* are not made in code.* picture448-b1-n1"):
        fitted_cases(adapter, cases[:1], 0, said.append, has_processor=True)


def test_no_word_stands_for_sound():
    model = tiny_model("qwen2_5_omni_thinker")
    ids = fresh_inputs(model, Case(16, 32, 1), torch.Generator().manual_seed(0))["input_ids"]
    of_sound = {model.config.audio_token_id, model.config.audio_start_token_id}
    assert not of_sound & set(ids.unique().tolist())


def test_more_images_than_the_text_can_part(adapters):
    adapter = adapters["llava-1.5-7b"]
    with pytest.raises(ValueError, match="28 images do not fit amid 10 other tokens: 30 are needed"):
        adapter.family.inputs_of(adapter, images_of(adapter, Case(16128, 1, 1)), 10)


def test_roofline_bounds_of_towers(adapters):
    """As worked out by hand, of one image each: 23 blocks of 12.6 M weights over 577 rows, an attention of 4 · 1024 ·
    577² in each, a patch embedding of 0.6 M, and a projector of 21 M weights; and so on."""
    by_hand = {
        "llava-1.5-7b": (
            Case(576, 1, 1),
            23 * (2 * 12.583e6 * 577 + 4 * 1024 * 577**2) + 2 * (0.602e6 + 20.97e6) * 576,
        ),
        "internvl3-8b": (
            Case(512, 1, 1),
            2 * 24 * (2 * 12.583e6 * 1025 + 4 * 1024 * 1025**2) + 2 * 0.602e6 * 2048 + 2 * 27.52e6 * 512,
        ),
        "qwen3-vl-8b": (
            Case(1024, 1, 1),
            27 * (2 * 15.225e6 * 4096 + 4 * 1152 * 4096**2) + 2 * 1.77e6 * 4096 + 4 * 2 * 40.11e6 * 1024,
        ),
    }
    for shape, (case, flops) in by_hand.items():
        adapter = adapters[shape]
        found = roofline_bounds(adapter, case, [case.n_visual] * adapter.n_layers, Roofline(1e12, 1e15))
        assert found["vision"] == pytest.approx(flops / 1e9, rel=0.005), shape


def test_weights_that_nothing_uses_are_not_read(adapters):
    """LLaVA takes the output of the last block but one."""
    adapter = adapters["llava-1.5-7b"]
    vision = sum(weight.numel() for name, weight in adapter.model.named_parameters() if "language_model" not in name)
    head = adapter.decoder.head.weight.numel()
    last = sum(weight.numel() for weight in adapter.vision.blocks[23].parameters())
    assert weights_of(adapter)["vision"] == vision - head - last
    tied = adapters["3b"]
    assert weights_of(tied)["embeddings"] == 0


def test_full_size_bounds_grow_with_images(adapters):
    for shape in TRUE_NUMBERS:
        adapter = adapters[shape]
        cases = [fitted(adapter, Case(n, 1, 64)) for n in (576, 1024, 4096)]
        bounds = [roofline_bounds(adapter, one, [one.n_visual] * adapter.n_layers, PEAKS) for one in cases]
        assert all(3.2 < one["decode_per_token"] < 3.9 for one in bounds)  # 14 GB and the cache
        assert bounds[0]["first_token"] < bounds[1]["first_token"] < bounds[2]["first_token"]
