"""Modules of towers that are recorded as they are give what they give one by one."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from sparsevlm import apply_sparsevlm
from sparsevlm.engine.capacities import tile_capacity
from sparsevlm.engine.cuda_graphs import GraphPool
from sparsevlm.engine.vision import captured
from sparsevlm.engine.vision.captured import CapturedTower
from sparsevlm.engine.vision.features import _layers_read
from sparsevlm.models import adapter_for
from toys import FAMILIES, IMAGE, PROMPTS, make_inputs, relative_error, tiny_model

OF_TILES = ("llava", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3", "deepseek_vl")
OF_SIZES = ("mistral3", "lighton_ocr")
OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6, "engine": True}
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def images(family, n, seed=0, kind="image"):
    """Pixels of n images, and how they are divided."""
    asked = ("image", 3, 4) if kind == "image" else ("video", 3, 3, 4)
    inputs = make_inputs([("text", 2), *[asked, ("text", 2)] * n], family=family, seed=seed)
    return {name: value for name, value in inputs.items() if "pixel" in name or name == "image_sizes"}


def features(model, given, tower=None, kind="image"):
    """Rows of all images, by a captured tower or by the modules one by one."""
    encode, (name, *_) = getattr(model.model, f"get_{kind}_features"), given
    more = {key: value for key, value in given.items() if key != name}
    place = contextlib.nullcontext() if tower is None else tower.in_place(_layers_read(adapter_for(model), more))
    with torch.no_grad(), place:
        found = encode(given[name], **more)
    return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in found.pooler_output])


def captured_tower(model):
    return CapturedTower(adapter_for(model), GraphPool(next(model.parameters()).device))


def check(model, tower, given, **more):
    wanted = features(model, given, **more)
    found = features(model, given, tower, **more)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", OF_TILES)
def test_tiles(family):
    model = tiny_model(family)
    tower, counts = captured_tower(model), (3, 1, 2, 3, 1)
    for seed, n in enumerate(counts):
        check(model, tower, images(family, n, seed))
    per_image = {"llava_next": 5, "llava_onevision": 5, "internvl": 3, "smolvlm": 3, "idefics3": 3}.get(family, 1)
    assert len(tower) == 2 * len({tile_capacity(n * per_image) for n in counts})
    with torch.no_grad():
        for weight in tower._tower.parameters():
            weight.mul_(1.5)
    check(model, tower, images(family, 2, seed=9))


def test_capacities():
    assert [tile_capacity(n) for n in range(1, 34)] == [
        1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16,
        *[20] * 4, *[24] * 4, *[28] * 4, *[32] * 4, 40,
    ]  # fmt: skip


@pytest.mark.parametrize("n_tiles", [9, 13, 17])
def test_places_that_are_left_empty(n_tiles):
    model = tiny_model("llava")
    tower = captured_tower(model)
    check(model, tower, images("llava", tile_capacity(n_tiles), seed=1))  # what a smaller call finds behind its own
    check(model, tower, images("llava", n_tiles, seed=2))
    assert len(tower) == 2


def test_videos_and_images_of_one_tower():
    model = tiny_model("llava_onevision")
    tower = captured_tower(model)
    for seed in range(2):
        check(model, tower, images("llava_onevision", 1, seed))
        check(model, tower, images("llava_onevision", 2, seed, "video"), kind="video")
    assert len(tower) == 4


def test_a_part_of_a_tile_is_hidden():
    model = tiny_model("smolvlm")
    tower = captured_tower(model)
    for rows in (28, 56, 42, 28):
        given = images("smolvlm", 1, rows)
        mask = torch.ones_like(given["pixel_values"][:, :, 0], dtype=torch.bool)
        mask[..., rows:, :] = False
        check(model, tower, {**given, "pixel_attention_mask": mask})
    assert len(tower) == 3  # without a mask, with one, and what is behind both


@pytest.mark.parametrize("layers", [-1, -3, 2, [-2, 1]])
def test_other_layers(layers):
    model = tiny_model("llava")
    if isinstance(layers, list):
        width = model.config.vision_config.hidden_size
        model.model.multi_modal_projector.linear_1 = nn.Linear(len(layers) * width, 64)
    tower = captured_tower(model)
    for seed in range(2):
        check(model, tower, {**images("llava", 2, seed), "vision_feature_layer": layers})


def test_hidden_states_that_nobody_reads_are_not_held():
    model = tiny_model("llava")
    tower, pixels = captured_tower(model), images("llava", 2)["pixel_values"]
    with torch.no_grad(), tower.in_place([-2]):
        found = model.model.vision_tower(pixels, output_hidden_states=True, return_dict=True).hidden_states
    assert [state is not None for state in found] == [False, False, False, True, False]
    assert "forward" not in vars(model.model.vision_tower)


def sized(n_tall):
    """Two images, of one of which the height is given."""
    sizes = torch.tensor([[n_tall * 28, 84], [56, 56]])
    pixels = torch.randn(2, 3, max(56, n_tall * 28), 84, generator=torch.Generator().manual_seed(n_tall))
    return {"pixel_values": pixels, "image_sizes": sizes}


def pixtral():
    """A tower of Pixtral in the class of LLaVA, as in the first checkpoints of it."""
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=224, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "make", [*(functools.partial(tiny_model, name) for name in OF_SIZES), pixtral], ids=[*OF_SIZES, "pixtral"]
)
def test_exact_sizes_are_recorded_when_they_come_again(make):
    model = make()
    tower = captured_tower(model)
    for heights, n_programs in (((3, 2, 4), 0), ((2,), 2), ((3, 2, 4), 6)):
        for height in heights:
            check(model, tower, sized(height))
        assert len(tower) == n_programs
    given = sized(3)
    check(model, tower, {**given, "pixel_values": given["pixel_values"] * 2})
    assert len(tower) == 6
    for _ in range(2):  # pixels of one shape do not tell the sizes
        check(model, tower, {**given, "image_sizes": given["image_sizes"].flip(0)})


def test_much_work_runs_one_by_one(monkeypatch):
    model, large = tiny_model("llava"), tiny_model("mistral3")
    monkeypatch.setattr(captured, "MOST_TILES", 2)
    monkeypatch.setattr(captured, "_MOST_NUMBERS", 1 << 10)
    tower, of_sizes = captured_tower(model), captured_tower(large)
    check(model, tower, images("llava", 3))
    for _ in range(3):
        check(large, of_sizes, sized(3))
    assert len(tower) == len(of_sizes) == 0
    check(model, tower, images("llava", 2))
    assert len(tower) == 2


def test_other_threads_run_the_modules():
    model = tiny_model("llava")
    tower, pixels, found = captured_tower(model), images("llava", 1)["pixel_values"], []
    with torch.no_grad(), tower.in_place(None):
        thread = threading.Thread(target=lambda: found.append(model.model.vision_tower(pixels).last_hidden_state))
        thread.start()
        thread.join()
    assert len(found) == 1
    assert len(tower) == 0


def generated(state, prompt="one image", family="llava"):
    """The reason of a call whose answer is that of hooks, and how many programs there are then."""
    model, inputs = state.adapter.model, make_inputs(*PROMPTS[prompt], family=family)
    with state.options(engine=False):
        wanted = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    assert state.report.path == "engine"
    return state.report.path_reason, len(state._engine._runner.captured)


class Doubled(nn.Linear):
    def forward(self, rows):
        return 2 * super().forward(rows)


def is_hooked(model):
    model.model.multi_modal_projector.linear_1.register_forward_hook(lambda module, args, output: output * 2)


def is_adapted(model):
    layer = model.model.vision_tower.encoder.layers[0].mlp
    layer.fc1 = copy.copy(layer.fc1)
    layer.fc1.__class__ = Doubled


def trains(model):
    model.model.vision_tower.train()


def has_another_forward(model):
    projector = model.model.multi_modal_projector
    projector.forward = lambda rows, plain=projector.forward: 2 * plain(rows)


def is_compiled(model):
    model.model.multi_modal_projector._compiled_call_impl = lambda rows: type(
        model.model.multi_modal_projector
    ).forward(model.model.multi_modal_projector, 2 * rows)


CHANGES = {
    is_hooked: "something is hooked to Linear",
    is_adapted: "a Doubled",
    trains: "training mode",
    has_another_forward: "something is hooked to LlavaMultiModalProjector",
    is_compiled: "compiled modules",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_others_put_into_the_tower_is_heeded(change):
    state = apply_sparsevlm(tiny_model("llava"), **OPTIONS)
    assert generated(state) == ("packed samples", 2)
    change(state.adapter.model)
    reason, _ = generated(state, "two images")
    assert reason == f"packed samples; the tower ran module by module: {CHANGES[change]}" + (
        ", which the engine does not call" if "hooked" in CHANGES[change] else ""
    )


def test_a_class_that_is_patched(monkeypatch):
    state = apply_sparsevlm(tiny_model("llava"), **OPTIONS)
    projector = type(state.adapter.model.model.multi_modal_projector)
    plain = projector.forward
    monkeypatch.setattr(projector, "forward", lambda self, rows: 2 * plain(self, rows))
    assert "LlavaMultiModalProjector.forward was replaced" in generated(state)[0]


def test_weights_elsewhere_need_new_programs():
    state = apply_sparsevlm(tiny_model("internvl"), **OPTIONS)
    model = state.adapter.model
    generated(state, "one image", "internvl"), generated(state, "two images", "internvl")
    assert len(state._engine._runner.captured) == 4
    norm = model.model.multi_modal_projector.layer_norm
    norm.weight = nn.Parameter(norm.weight * 3)
    assert generated(state, "one image", "internvl")[1] == 2
    norm.eps = 0.5
    assert generated(state, "two images", "internvl")[1] == 2


def test_another_attention_is_another_program():
    state = apply_sparsevlm(tiny_model("llava"), **OPTIONS)
    tower = state.adapter.model.model.vision_tower
    assert generated(state)[1] == 2
    tower.config._attn_implementation_internal = "eager" if tower.config._attn_implementation == "sdpa" else "sdpa"
    assert generated(state) == ("packed samples", 4)


def test_without_memory_the_modules_run_one_by_one(monkeypatch):
    state = apply_sparsevlm(tiny_model("llava"), **OPTIONS)

    def fails(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(captured, "_Program", fails)
    assert generated(state) == ("packed samples; the tower ran module by module: out of memory", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*OF_TILES, *OF_SIZES])
def test_on_a_gpu(family):
    """Graphs give what the modules give, in half precision, and the answers are those of the modules."""
    model = tiny_model(family).to("cuda", torch.bfloat16)
    tower = captured_tower(model)
    for seed, n in enumerate((1, 3, 2, 1, 3, 2)):
        given = {name: value.cuda() for name, value in images(family, n, seed).items()}
        given = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
        if "image_sizes" in given:
            given["image_sizes"] = given["image_sizes"].cpu()
        assert relative_error(features(model, given, tower), features(model, given)) < 2e-2
    assert all(
        hasattr(program._run, "run") for program in (*tower._graphs._things.values(), *tower._sized._things.values())
    )
    assert len(tower) == 2 * 3


@pytest.mark.gpu
@pytest.mark.parametrize("family", [*OF_TILES, *OF_SIZES, "qwen3_vl"])
def test_requests_on_a_gpu(family):
    model = tiny_model(family).to("cuda", torch.bfloat16)
    state = apply_sparsevlm(model, **{**OPTIONS, "keep": 1.0})
    for seed, prompt in enumerate(("one image", "two images", "one image", "two images", "one image")):
        inputs = make_inputs(*PROMPTS[prompt], family=family, seed=seed)
        inputs = {name: value.cuda() for name, value in inputs.items()}
        logits = []
        for engine in (False, True):
            with state.options(engine=engine):
                output = model.generate(
                    **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            logits.append(output.logits[0])
        assert state.report.path == "engine"
        assert "module by module" not in state.report.path_reason
        assert relative_error(*reversed(logits)) < 1e-1


def test_all_of_the_engine_have_a_tower_that_is_recorded():
    found = {name for name, family in FAMILIES.items() if family.on_engine}
    described = {name: adapter_for(tiny_model(name)).vision for name in sorted(found)}
    assert all(vision.captured or vision.program for vision in described.values())
    of_sizes = {name for name, vision in described.items() if vision.captured and not vision.captured[0].in_tiles}
    assert of_sizes == set(OF_SIZES)
