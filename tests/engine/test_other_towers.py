"""Decoders on the engine behind other towers than those of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from covering import parametrize_pairs
from sparsevlm import apply_sparsevlm
from toys import FAMILIES, IS_OLD, ON_ENGINE, PROMPTS, make_inputs, runs_on_engine, tiled, tiny_model

OPTIONS = {"min_keep": 3, "target_layers": [0, 2], "keep": 0.6}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
CALLS = {
    "greedy": GREEDY,
    "sampled": {"max_new_tokens": 6, "do_sample": True, "temperature": 1.5},
    "several answers": {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 3},
    "penalty": {**GREEDY, "repetition_penalty": 1.3},
}
OTHERS = tuple(name for name in ON_ENGINE if not name.startswith("qwen2"))


def answer(model, inputs, **call):
    torch.manual_seed(0)
    return model.generate(**inputs, **call)


def check(model, inputs, path="engine", call=GREEDY, **options):
    """The same answer and report on hooks and on the engine, or what else it runs on; the reason for that."""
    state = apply_sparsevlm(model, **{**OPTIONS, **options})
    wanted, report = answer(model, inputs, **call), state.report
    assert report.path == "plain"
    with state.options(engine=True):
        assert torch.equal(answer(model, inputs, **call), wanted)
    found = state.report
    assert found.path == path
    assert found.samples == report.samples
    assert (found.decode_steps, found.flops, found.kv_bytes.dense) == (
        report.decode_steps, report.flops, report.kv_bytes.dense,
    )  # fmt: skip
    return found.path_reason


def hooks_take(case) -> bool:
    """Older transformers give images of copied prompts to the wrong ones, which hooks refuse."""
    return runs_on_engine(case) and (case["call"] != "several answers" or FAMILIES[case["family"]].repeats == "samples")


@parametrize_pairs(hooks_take, family=OTHERS, prompt=["one image", "batch, unequal counts", "video"], call=list(CALLS))
def test_calls(family, prompt, call):
    check(tiny_model(family), make_inputs(*PROMPTS[prompt], family=family), call=CALLS[call])


@pytest.mark.parametrize(
    ("family", "prompt"), [("llava", "one image"), ("qwen3_vl", "video"), ("qwen2_5_vl", "image and video")]
)
def test_the_time_of_towers_is_booked(family, prompt):
    """Also of those that run by their own modules, and of images and videos together, which no graph encodes ahead."""
    model = tiny_model(family)
    state = apply_sparsevlm(model, **OPTIONS, engine=True)
    model.generate(**make_inputs(*PROMPTS[prompt], family=family), **GREEDY)
    assert state.report.path == "engine"
    assert state.report.wall_ms["vision"] > 0


@pytest.mark.parametrize("text", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_text_models(family, text, monkeypatch):
    monkeypatch.setattr("toys.models._MADE", {})
    monkeypatch.setattr(tiled, "LlamaConfig" if family == "llava" else "Qwen3Config", text)
    model = tiny_model(family, text_options={"sliding_window": None} if text is MistralConfig else {})
    assert type(model.config.text_config) is text
    check(model, make_inputs(*PROMPTS["batch, left padding"], family=family))


def test_what_is_asked_of_the_tower():
    model, inputs = tiny_model("llava"), make_inputs(*PROMPTS["one image"], family="llava")
    reason = check(model, inputs, vision_keep=0.5)
    assert "the tower computed all: the vision tower of a LlavaForConditionalGeneration, which has no program" in reason
    reason = check(model, inputs, image_cache=1 << 20)
    assert "image_cache was not asked" in reason
    reason = check(model, inputs, "plain", selector="visionzip", target_layers=None)
    assert "selector 'visionzip' needs vision_attention, vision_keys of a tower that is not the engine's" in reason
    reason = check(model, inputs, "plain", {**GREEDY, "num_beams": 2})
    assert "no greedy or sampling call" in reason


def test_the_tower_runs_by_its_modules():
    model, inputs = tiny_model("llava"), make_inputs(*PROMPTS["two images"], family="llava")
    state, calls = apply_sparsevlm(model, **OPTIONS, engine=True), []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    answer(model, inputs, **GREEDY)
    assert (state.report.path, len(calls)) == ("engine", 1)
    assert state.report.wall_ms["vision"] > 0
    assert state.report.samples[0].grids == ((1, 4, 4), (1, 4, 4))


def hidden_rows(inputs):
    mask = torch.ones_like(inputs["pixel_values"][:, :, 0], dtype=torch.bool)
    mask[..., 28:, :] = False
    return mask


def uncut(inputs):
    """Two images in one prompt: a tile each."""
    both = make_inputs(*PROMPTS["two images"], family="llava_onevision")
    ids = both["input_ids"][0].tolist()
    kept, run = [], 0
    for token in ids:
        run = run + 1 if token == 90 else 0
        kept += [token] if run <= 10 else []  # nine patches and a newline
    inputs |= both
    inputs["input_ids"] = torch.tensor([kept])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["batch_num_images"] = torch.tensor([2])


MORE = {
    "no mask": ("internvl", lambda inputs: inputs.pop("attention_mask")),
    "positions": ("llava", lambda inputs: inputs.update(position_ids=torch.arange(inputs["input_ids"].shape[1])[None])),
    "another layer": ("llava", lambda inputs: inputs.update(vision_feature_layer=-3)),
    "a part of a tile": ("smolvlm", lambda inputs: inputs.update(pixel_attention_mask=hidden_rows(inputs))),
    "images that are not cut": ("llava_onevision", uncut),
}


@pytest.mark.parametrize("case", MORE)
def test_inputs(case):
    family, change = MORE[case]
    inputs = make_inputs(*PROMPTS["one image"], family=family)
    change(inputs)
    check(tiny_model(family), inputs)


@pytest.mark.skipif(IS_OLD, reason="this transformers takes no encoded images")
def test_encoded_images():
    model, inputs = tiny_model("internvl"), make_inputs(*PROMPTS["two images"], family="internvl")
    with torch.no_grad():
        inputs["mm_encoder_outputs"] = {"image": model.model.get_image_features(inputs.pop("pixel_values"))}
    check(model, inputs)


def test_a_streamer():
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, inputs = tiny_model("mistral3"), make_inputs(*PROMPTS["one image"], family="mistral3")
    state, streamer = apply_sparsevlm(model, **OPTIONS, engine=True), Streamer()
    output = answer(model, inputs, **GREEDY, streamer=streamer)
    assert state.report.path == "engine"
    assert (streamer.tokens, streamer.ended) == (output[0].tolist(), True)


@pytest.mark.skipif(not IS_OLD, reason="newer transformers end a video in the encoder")
def test_a_video_whose_end_is_put_behind_it_runs_on_hooks():
    inputs = make_inputs(*PROMPTS["video"], family="llava_onevision")
    reason = check(tiny_model("llava_onevision"), inputs, "plain")
    assert "placeholders and features that differ in number" in reason
