"""From a picture and a question to the first token, on a tiny model."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from sparsevlm.bench import shapes
from sparsevlm.bench.cases import PictureCase
from sparsevlm.bench.checkpoint import SPECIAL_TOKENS, write_checkpoint_files
from sparsevlm.bench.pictures import Pictures
from sparsevlm.bench.providers import make_providers
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.run import run
from sparsevlm.inputs import load_processor
from tiny_checkpoint import save_tiny_checkpoint, tiny_model

SMALL = PictureCase(168, new_tokens=2)  # 36 visual tokens
SETTINGS = Settings((0.5,), iterations=2, warmup=1)
ORIGIN = {"commit": "abc", "model": "tiny", "command": "sparsevlm bench"}


@pytest.fixture(scope="module")
def model():
    return shapes.random_model("tiny", "cpu", torch.float32, "sdpa", layers=6)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_checkpoint_files(model.config, folder)
    return folder


def test_rows(model):
    rows = run(model, [SMALL], SETTINGS, ORIGIN)
    names = ("hf-dense", "ours-default", "ours-dense", "ours", "ours-engine", "ours-sparsevlm")
    assert {row["provider"] for row in rows} == set(names)
    assert {row["case"] for row in rows} == {"picture168-b1-n2"}
    assert {row["n_visual"] for row in rows} == {"36"}
    assert {row["n_text"] for row in rows} == {"42"}  # as in the other cases
    for provider in names:
        by = {row["phase"]: row for row in rows if row["provider"] == provider and row["metric"] == "ms"}
        parts = ("preprocess", "vision", "prefill")
        assert 0 < sum(float(by[phase]["p20"]) for phase in parts) < float(by["first_token"]["p80"])
        assert float(by["first_token"]["p50"]) < float(by["total"]["p50"])
        assert "Processor with " in by["total"]["note"]
        assert provider == "hf-dense" or by["total"]["note"].startswith("ImageTextProcessor with PilImageProcessor")


def test_the_processor_of_a_checkpoint(tmp_path):
    folder = save_tiny_checkpoint(tmp_path, n_layers=6)
    rows = run(tiny_model(n_layers=6), [SMALL], SETTINGS, ORIGIN, checkpoint=folder)
    assert {row["n_visual"] for row in rows} == {"36"}
    assert all(row["p50"] for row in rows)


def test_every_picture_is_new_and_both_processors_see_the_same(model, folder):
    pictures = Pictures(folder, model.device, SMALL, seed=0)
    theirs, ours = (make_providers(model, (0.5,), static=False)[i] for i in (0, -1))
    first, second = pictures.draw(), pictures.draw()
    assert not torch.equal(first(ours)()["pixel_values"], second(ours)()["pixel_values"])
    assert torch.equal(first(ours)()["input_ids"], first(theirs)()["input_ids"])
    assert torch.allclose(first(ours)()["pixel_values"], first(theirs)()["pixel_values"], atol=1e-2)


def test_files_of_a_shape(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>ab<|im_end|>"
    ids = tokenizer(text)["input_ids"]
    names = ("<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>")
    assert [i for i in ids if i > 255] == [SPECIAL_TOKENS[name] for name in names]
    assert len(ids) == 5 + 5 + 2
    config = AutoConfig.from_pretrained(folder)
    assert config.image_token_id == SPECIAL_TOKENS["<|image_pad|>"]
    assert config.text_config.to_dict() == model.config.text_config.to_dict()
    assert config.vision_config.to_dict() == model.config.vision_config.to_dict()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    size = load_processor(folder).image_processor.size
    assert size["longest_edge"] == 16384 * 28 * 28  # the largest case is not made smaller


def test_special_tokens_are_those_of_the_shapes(model):
    config = model.config
    assert SPECIAL_TOKENS["<|vision_start|>"] == config.vision_start_token_id
    assert SPECIAL_TOKENS["<|vision_end|>"] == config.vision_end_token_id
    assert SPECIAL_TOKENS["<|video_pad|>"] == config.video_token_id
