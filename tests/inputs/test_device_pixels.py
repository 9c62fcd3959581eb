"""Images that are resized and cut on a device: the very values of Pillow and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from sparsevlm.inputs import ImageTextProcessor, image_processor, image_text_processor, video_processor
from sparsevlm.inputs.device_pixels import _PROBES, _none_first, _steep_first, _tall_first, pillow_order, resize
from tiny_checkpoint import save_tiny_checkpoint

TEXT = "a <|image_pad|> and <|image_pad|> and <|video_pad|> seen"


def noise(width, height, seed=0, sharp=True):
    """Edges between black and white, beside plain noise: filters overshoot there."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if sharp:
        values[: height // 2] = 255 * rng.integers(0, 2, (height // 2, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((50, 40), (56, 56)), ((1, 1), (28, 28)), ((640, 480), (84, 56)), ((333, 777), (336, 784)),
        ((100, 60), (100, 28)), ((90, 60), (28, 60)), ((7, 1400), (28, 1316)), ((1999, 35), (1120, 28)),
        ((90, 300), (56, 168)), ((300, 90), (168, 56)), ((56, 84), (56, 84)),
    ],
    ids=str,
)  # fmt: skip
def test_resized_as_by_pillow(before, after):
    images = [noise(*before, seed) for seed in range(3)]
    wanted = np.stack([np.asarray(image.resize(after, Image.Resampling.BICUBIC)) for image in images])
    frames = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    assert np.array_equal(resize(frames, after[1], after[0], pillow_order()).numpy(), wanted)


def test_many_frames_are_resized_in_parts(monkeypatch):
    frames = torch.from_numpy(np.stack([np.asarray(noise(64, 48, seed)) for seed in range(5)]))
    wanted = resize(frames, 56, 28, pillow_order())
    monkeypatch.setattr("sparsevlm.inputs.device_pixels._MOST_NUMBERS", 2 * 64 * 56 * 3)
    assert torch.equal(resize(frames, 56, 28, pillow_order()), wanted)


def test_the_order_of_the_axes_is_found():
    """Probes tell the rules apart, and a Pillow with another rule from all of them."""
    orders = (_steep_first, _tall_first, _none_first)
    assert pillow_order() in orders
    assert len({tuple(order(*probe) for probe in _PROBES) for order in orders}) == len(orders)
    values = 255 * np.random.default_rng(0).integers(0, 2, (310, 16, 3))
    for width, height, *after in _PROBES:
        image = torch.from_numpy(values[:height, :width].astype(np.uint8))[None]
        either = [resize(image, after[1], after[0], lambda *_, first=first: first) for first in (True, False)]
        assert not torch.equal(*either)


def test_a_pillow_of_another_kind_works_on_the_host(folder, device, monkeypatch):
    processor = ImageTextProcessor.from_folder(folder)
    wanted = processor(images=noise(150, 90))
    monkeypatch.setattr(image_processor, "pillow_order", lambda: None)
    monkeypatch.setattr(image_processor, "upload", None)
    found = processor(images=noise(150, 90), device=device)
    assert torch.equal(found["pixel_values"].cpu(), wanted["pixel_values"])
    assert found["pixel_values"].device.type == device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """A device; the CPU in the place of one."""
    if request.param == "cpu":
        for module in (image_processor, image_text_processor, video_processor):
            monkeypatch.setattr(module, "is_elsewhere", lambda device: device is not None)
        real = image_processor.PilImageProcessor._on_device
        calls = []
        monkeypatch.setattr(
            image_processor.PilImageProcessor, "_on_device", lambda *a, **k: calls.append(1) or real(*a, **k)
        )
        monkeypatch.setattr(image_processor.PilImageProcessor, "calls", calls, raising=False)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), "qwen2_5_vl")


@pytest.mark.parametrize(
    ("options", "on_device"),
    [
        ({}, True),
        ({"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}}, True),
        ({"min_pixels": 200 * 200, "max_pixels": 280 * 280}, True),
        ({"do_rescale": False, "do_normalize": False}, True),
        ({"images_kwargs": {"do_normalize": False}}, True),
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.2, 0.1]}, True),
        ({"do_resize": False}, True),
        ({"num_frames": 4, "do_sample_frames": True}, True),
        ({"resample": 2}, False),
    ],
    ids=str,
)
def test_patches_are_those_of_the_host(folder, options, on_device, device):
    processor = ImageTextProcessor.from_folder(folder)
    images = [noise(112, 84), noise(112, 84, 1)] if "do_resize" in options else [noise(150, 90), noise(90, 150, 1)]
    videos = [[noise(112, 84, seed) for seed in range(5)]]
    wanted = processor(text=TEXT, images=images, videos=videos, **options)
    found = processor(text=TEXT, images=images, videos=videos, **options, device=device)
    if device == "cpu":
        assert len(processor.image_processor.calls) == 2 * on_device  # images, and frames
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(torch.as_tensor(found[name]).cpu(), torch.as_tensor(value)), name
        if name.startswith("pixel_values"):
            assert (found[name].device.type, found[name].dtype) == (device, torch.float32)


@pytest.mark.parametrize("kind", ["floats", "arrays of 8 bits", "one image", "the processor of transformers", "alone"])
def test_what_comes_in_other_forms(folder, kind, device):
    processor, options = ImageTextProcessor.from_folder(folder), {"text": "<|image_pad|>", "images": noise(150, 90)}
    if kind == "floats":
        options |= {"images": np.asarray(noise(150, 90), dtype=np.float32) / 255, "do_rescale": False}
    elif kind == "arrays of 8 bits":
        options["images"] = torch.from_numpy(np.asarray(noise(150, 90)).transpose(2, 0, 1).copy())
    elif kind == "alone":
        del options["text"]
    elif kind == "the processor of transformers":
        processor = ImageTextProcessor(processor.tokenizer, Qwen2VLImageProcessorPil.from_pretrained(folder))
    wanted, found = processor(**options), processor(**options, images_kwargs={"device": torch.device(device)})
    assert torch.equal(found["pixel_values"].cpu(), wanted["pixel_values"])
    assert found["pixel_values"].device.type == device
    if device == "cpu" and kind in ("arrays of 8 bits", "one image", "alone"):
        assert processor.image_processor.calls


def test_arrays_are_not_fetched_back(folder, device):
    processor = ImageTextProcessor.from_folder(folder)
    for visuals in ({"images": noise(56, 56)}, {"videos": [[noise(56, 56)] * 2]}):
        with pytest.raises(ValueError, match=r"gives tensors of torch, and return_tensors='np' asks for others"):
            processor(**visuals, device=device, return_tensors="np")


def test_a_conversation_is_cut_on_the_device(folder, device):
    processor = ImageTextProcessor.from_folder(folder)
    parts = [{"type": "image", "image": noise(150, 90)}, {"type": "text", "text": "what?"}]
    messages, options = [{"role": "user", "content": parts}], {"tokenize": True, "return_dict": True}
    wanted = processor.apply_chat_template(messages, **options)
    found = processor.apply_chat_template(messages, **options, processor_kwargs={"device": device})
    assert torch.equal(found["pixel_values"].cpu(), wanted["pixel_values"])
    assert found["pixel_values"].device.type == device
