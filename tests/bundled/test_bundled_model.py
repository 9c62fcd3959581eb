"""The bundled model loads with stock classes and reads numbers it has never seen."""

import pytest
import torch
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from sparsevlm.bundled import bundled_path
from sparsevlm.scenes import draw_scene

N_SCENES = 12
FIRST_SEED = 900_000


@pytest.fixture(scope="module")
def parts():
    path = bundled_path()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(path), Qwen2VLImageProcessorPil.from_pretrained(path)


def _answer(parts, image, text):
    model, tokenizer, processor = parts
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    pixels = processor(images=[image], return_tensors="pt")
    n_visual = int(pixels["image_grid_thw"].prod()) // processor.merge_size**2
    inputs = tokenizer(prompt.replace("<|image_pad|>", "<|image_pad|>" * n_visual), return_tensors="pt")
    is_image = (inputs.input_ids == model.config.image_token_id).long()
    output = model.generate(**inputs, **pixels, mm_token_type_ids=is_image, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_weights_fit_the_promise(parts):
    model, tokenizer, _ = parts
    shards = list(bundled_path().glob("*.safetensors"))
    assert sum(shard.stat().st_size for shard in shards) < 36_000_000
    assert max(shard.stat().st_size for shard in shards) < 12_600_000
    ids = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids(ids["image"])
    assert model.config.video_token_id == tokenizer.convert_tokens_to_ids(ids["video"])
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_scene_is_256_visual_tokens(parts):
    grid = parts[2](images=[draw_scene(0).image], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 32, 32]]


def test_reads_numbers(parts):
    torch.manual_seed(0)
    hits = 0
    for seed in range(FIRST_SEED, FIRST_SEED + N_SCENES):
        scene = draw_scene(seed)
        question = scene.question("number")
        hits += _answer(parts, scene.image, question.text) == question.answer
    assert hits >= N_SCENES - 1
