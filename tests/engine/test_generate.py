"""The engine under an unchanged ``generate``."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.hooks import vision_attention
from sparsevlm.kernels.attention import varlen_attention
from toys import PROMPTS, make_inputs, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
BATCH = PROMPTS["batch, left padding"]


def answers(model, inputs, seed=0, **options):
    torch.manual_seed(seed)
    return model.generate(**inputs, **options)


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5},
        {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3},
        {**GREEDY, "repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_generate_says_the_same(prompt, options):
    model, inputs = tiny_model(), make_inputs(*PROMPTS[prompt])
    state = apply_sparsevlm(model, **OPTIONS)
    wanted, report = answers(model, inputs, **options), state.report
    assert report.path == "plain"
    with state.options(engine=True):
        found = answers(model, inputs, **options)
    assert state.report.path == ("engine" if report.skipped_because is None else "plain")
    assert torch.equal(found, wanted)
    assert state.report.samples == report.samples
    assert state.report.decode_steps == report.decode_steps
    assert state.report.flops == report.flops
    assert state.report.kv_bytes.dense == report.kv_bytes.dense


LAYOUTS = {
    "as before": ([("text", 3), ("image", 4, 6), ("text", 5)], 0),
    "the image at another place": ([("text", 5), ("image", 4, 6), ("text", 3)], 1),
    "another grid": ([("text", 3), ("image", 6, 4), ("text", 5)], 1),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_positions_are_computed_once_for_prompts_of_one_layout(case, monkeypatch):
    """Words are nothing of it."""
    row, n_computed = LAYOUTS[case]
    model, computed = tiny_model(), []
    compute = type(model)._prepare_position_ids_for_generation
    monkeypatch.setattr(
        type(model), "_prepare_position_ids_for_generation", lambda *args: computed.append(1) or compute(*args)
    )
    state, inputs = apply_sparsevlm(model, **OPTIONS), make_inputs(row, seed=1)
    wanted = answers(model, inputs, **GREEDY)
    with state.options(engine=True):
        answers(model, make_inputs(LAYOUTS["as before"][0]), **GREEDY)
        computed.clear()
        assert torch.equal(answers(model, inputs, **GREEDY), wanted)
    assert (state.report.path, len(computed)) == ("engine", n_computed)


def test_a_sample_that_ends_early_is_padded():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **OPTIONS)
    first = answers(model, inputs, **GREEDY)[0, inputs["input_ids"].shape[1]].item()
    options = {**GREEDY, "eos_token_id": first, "pad_token_id": 95}
    wanted = answers(model, inputs, **options)
    with state.options(engine=True):
        assert torch.equal(answers(model, inputs, **options), wanted)
        assert state.report.path == "engine"


REFUSED = {
    "beams": ({"num_beams": 2}, "no greedy or sampling call"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation='static'"),
    "no cache": ({"use_cache": False}, "no cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_engine_does_not_do_runs_on_the_plain_path(case):
    options, reason = REFUSED[case]
    model, inputs = tiny_model(attn="eager"), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    found = answers(model, inputs, **GREEDY, **options)
    assert state.report.path == "plain"
    assert reason in state.report.path_reason
    with state.options(engine=False):
        wanted = answers(model, inputs, **GREEDY, **options)
    assert torch.equal(*(one if isinstance(one, torch.Tensor) else one.sequences for one in (found, wanted)))
    answers(model, inputs, **GREEDY)
    assert state.report.path == "engine"


@pytest.mark.parametrize("engine", [False, True])
def test_prompts_given_twice_are_refused_as_transformers_does(engine):
    model, inputs = tiny_model(), make_inputs(*PROMPTS["one image"])
    apply_sparsevlm(model, **OPTIONS, engine=engine)
    with pytest.raises(ValueError, match="alongside"):
        model.generate(inputs["input_ids"], **inputs, **GREEDY)


VISIONZIP = {**OPTIONS, "selector": "visionzip", "target_layers": None}


def test_parts_of_a_picture_are_read_on_the_plain_path():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **VISIONZIP, vision_keep=0.5, engine=True)
    answers(model, inputs, **GREEDY)
    assert state.report.path == "plain"
    assert "needs vision_attention, vision_keys of all patches" in state.report.path_reason


def test_a_tower_that_others_hook_is_read_on_the_plain_path():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **VISIONZIP, engine=True)
    answers(model, inputs, **GREEDY)
    assert state.report.path == "engine"
    calls = []
    handle = model.model.visual.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    answers(model, inputs, **GREEDY)
    assert (state.report.path, len(calls)) == ("plain", 1)
    assert "needs vision_attention, vision_keys of a tower that is not the engine's" in state.report.path_reason
    with state.options(keep=1.0):  # nothing is asked of the selector
        answers(model, inputs, **GREEDY)
        assert (state.report.path, len(calls)) == ("engine", 2)
    handle.remove()


def test_hooks_of_others_run():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    calls = []
    handle = model.model.language_model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    answers(model, inputs, **GREEDY)
    assert calls
    assert "hooks on" in state.report.path_reason
    handle.remove()
    answers(model, inputs, **GREEDY)
    assert state.report.path == "engine"


def test_text_alone_and_direct_calls_are_dense():
    model = tiny_model()
    wanted = answers(model, text := make_inputs([("text", 9)]), **GREEDY)
    inputs = make_inputs(*BATCH)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    assert torch.equal(answers(model, text, **GREEDY), wanted)
    answers(model, inputs, **GREEDY)
    with torch.no_grad():
        model(**inputs)
    assert "a direct call of the model" in state.report.path_reason
    assert torch.equal(answers(model, text, **GREEDY), wanted)


def test_remove_and_copies():
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    wanted = answers(model, inputs, **GREEDY)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(answers(twin, inputs, **GREEDY), wanted)
    assert state.attached
    remove_sparsevlm(twin)
    assert [name for name in vars(model) if name not in vars(twin)] == ["generate"]
    for (name, module), other in zip(model.named_modules(), twin.modules(), strict=True):
        if name:
            assert vars(module).keys() - vars(other).keys() <= {"_sparsevlm_state"}, name
    remove_sparsevlm(model)
    assert vars(model).keys() == vars(twin).keys()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl"])
def test_weights_are_the_models_own(family, tmp_path):
    """They lie side by side while the engine runs: same names, shapes and values, nothing held twice."""
    model, inputs = tiny_model(family), make_inputs(*PROMPTS["one image"], family=family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    parameters = list(model.parameters())
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    wanted = answers(model, inputs, **GREEDY)
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    for weights in (model.state_dict(), loaded):
        assert weights.keys() == before.keys()
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    with torch.no_grad():
        attention.v_proj.weight.add_(0.5)  # as a merged adapter does
    changed = answers(model, inputs, **GREEDY)
    with state.options(engine=False):
        assert torch.equal(answers(model, inputs, **GREEDY), changed)
    assert not torch.equal(changed, wanted)
    remove_sparsevlm(model)
    storages = [weight.untyped_storage().data_ptr() for weight in model.parameters()]
    assert len(set(storages)) == len(storages)
    assert all(weight.is_contiguous() for weight in model.parameters())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("prompt", ["one image", "two images", "batch, left padding", "video"])
def test_the_vision_tower_says_the_same(prompt, family):
    model, inputs = tiny_model(family), make_inputs(*PROMPTS[prompt])
    kind = "pixel_values" if "pixel_values" in inputs else "pixel_values_videos"
    tower, pixels = model.model.visual, inputs[kind]
    grids = inputs["image_grid_thw" if kind == "pixel_values" else "video_grid_thw"]
    with torch.no_grad():
        wanted = tower(pixels, grid_thw=grids)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    runner = state._engine._runner
    runner.quick_check()
    for factor in (3, 2, 4, 1):  # a program's second run sees nothing of the first
        with torch.no_grad():
            found = runner.vision(pixels * factor, tuple((t, h // 2, w // 2) for t, h, w in grids.tolist()))
    torch.testing.assert_close(found.tokens, wanted.pooler_output, rtol=1e-5, atol=1e-5)
    assert len(runner.vision) == 1
    with torch.no_grad(), state.options(engine=False):
        assert torch.equal(tower(pixels, grid_thw=grids).pooler_output, wanted.pooler_output)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt", ["one image", "two images", "batch, left padding"])
def test_the_vision_tower_makes_one_call_per_block(prompt, attn, family, monkeypatch):
    """Where it runs by its own modules, because something is hooked to them."""
    model, inputs = tiny_model(family, attn), make_inputs(*PROMPTS[prompt])
    tower, pixels, grids = model.model.visual, inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        wanted = tower(pixels, grid_thw=grids).pooler_output
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return varlen_attention(*args, **kwargs)

    monkeypatch.setattr(vision_attention, "varlen_attention", counted)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    seen = []
    tower.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        found = tower(pixels, grid_thw=grids).pooler_output
    assert (len(calls), len(seen)) == (len(tower.blocks), 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), state.options(engine=False):
        assert torch.equal(tower(pixels, grid_thw=grids).pooler_output, wanted)
    with pytest.raises(RuntimeError):
        tower(pixels[:, :5], grid_thw=grids)
    assert tower.config._attn_implementation == attn


@pytest.mark.parametrize("selector", ["visionzip", "hiprune", "scope"])
def test_selectors_that_look_into_the_vision_tower_see_the_same(selector):
    model, inputs = tiny_model(), make_inputs(*BATCH)
    state = apply_sparsevlm(model, min_keep=3, keep=0.6, selector=selector)
    answers(model, inputs, **GREEDY)
    kept = [sample.stages[0].kept for sample in state.report.samples]
    with state.options(engine=True):
        answers(model, inputs, **GREEDY)
    assert state.report.path == "engine"
    assert [sample.stages[0].kept for sample in state.report.samples] == kept


def test_a_forward_that_others_had_set_is_called_and_given_back():
    """As accelerate does for models over several devices."""
    model, inputs = tiny_model(), make_inputs(*BATCH)
    wanted = answers(model, inputs, **GREEDY)
    text_model, calls = model.model.language_model, []
    own = text_model.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    text_model.forward = wrapped
    apply_sparsevlm(model, **OPTIONS)
    answers(model, inputs, **GREEDY)
    assert len(calls) == GREEDY["max_new_tokens"]
    apply_sparsevlm(model, **OPTIONS)
    remove_sparsevlm(model)
    assert text_model.forward is wrapped
    assert torch.equal(answers(model, inputs, **GREEDY), wanted)
    assert "forward" not in vars(model.model.visual)
