"""Our processor against the real one of transformers, where torchvision is there to make it."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from sparsevlm.inputs import (
    ImageTextProcessor,
    image_processor,
    image_text_processor,
    torchvision_works,
    video_processor,
)
from tiny_checkpoint import save_tiny_checkpoint

if not torchvision_works():
    pytest.skip("needs torchvision, which our processor does without", allow_module_level=True)

TEXT = "a <|image_pad|> and <|video_pad|> seen"
# Pillow and torchvision round resized values of 8 bits apart by one now and then, and by two in one of 100000; a step
# of normalised values is up to 0.0154.
ONE_STEP = 0.0155


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height // 7, width // 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def both(request, tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    theirs = AutoProcessor.from_pretrained(folder)
    theirs.tokenizer.padding_side = "left"
    return ImageTextProcessor.from_folder(folder), theirs


def compare(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        if name.startswith("pixel_values"):
            assert got[name].shape == value.shape, name
            assert (got[name] - value).abs().max() < 2 * ONE_STEP, name
            assert ((got[name] - value).abs() > ONE_STEP).float().mean() < 1e-4, name
        else:
            assert torch.equal(got[name], torch.as_tensor(value)), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}},
        {"min_pixels": 200 * 200, "max_pixels": 280 * 280},
        {"images_kwargs": {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}}},
        {"videos_kwargs": {"size": {"shortest_edge": 56 * 56, "longest_edge": 84 * 84}}},
        {"do_rescale": False, "do_normalize": False},
        {"images_kwargs": {"do_normalize": False}},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"resample": 2},
        {"do_resize": False},
        {"num_frames": 4, "do_sample_frames": True},
        {"num_frames": 3, "do_sample_frames": True},
        {"fps": 1.0, "do_sample_frames": True, "video_metadata": [{"fps": 2.0, "total_num_frames": 9}]},
        {"fps": 0.1, "do_sample_frames": True, "video_metadata": [{"fps": 2.0, "total_num_frames": 9}]},
        {"video_metadata": [{"fps": 2.0, "total_num_frames": 90, "frames_indices": list(range(0, 90, 10))}]},
        {"cap_pixels_per_frame": False},
        {"padding": "max_length", "max_length": 900},
        {"truncation": True, "max_length": 900},
        {"text_kwargs": {"add_special_tokens": False}},
    ],
    ids=str,
)
def test_options(both, options):
    ours, theirs = both
    visuals = {"images": noise(112, 84), "videos": [[noise(112, 84, seed) for seed in range(9)]]}
    got = ours(text=TEXT, **visuals, **options)
    wanted = theirs(text=TEXT, **visuals, **options, return_tensors="pt")
    if "do_rescale" in options:
        got, wanted = ({k: v / 255 if k.startswith("pixel") else v for k, v in one.items()} for one in (got, wanted))
    compare(got, wanted)


def test_a_cap_on_the_pixels_of_a_video(both, monkeypatch):
    ours, theirs = both
    for one in both:
        monkeypatch.setattr(one.video_processor, "max_video_tokens", 40)
    options = {"cap_pixels_per_frame": True, "size": {"shortest_edge": 784, "longest_edge": 10**6}}
    videos = [[noise(112, 84, seed) for seed in range(9)]]
    got = ours(text="<|video_pad|>", videos=videos, **options)
    compare(got, theirs(text="<|video_pad|>", videos=videos, **options, return_tensors="pt"))
    assert got["video_grid_thw"].tolist() == [[5, 4, 6]]


@pytest.mark.parametrize("kind", ["array", "channels first", "tensor", "videos of arrays", "five dimensions"])
def test_arrays(both, kind):
    ours, theirs = both
    frames = np.stack([np.asarray(noise(84, 56, seed)) for seed in range(4)])
    image, videos = frames[0], [frames]
    if kind == "channels first":
        image, videos = image.transpose(2, 0, 1), [frames.transpose(0, 3, 1, 2)]
    elif kind == "tensor":
        image, videos = torch.from_numpy(image), [torch.from_numpy(frames)]
    elif kind == "videos of arrays":
        videos = [list(frames)]
    elif kind == "five dimensions":
        videos = frames[None]
    options = {"text": TEXT, "images": [image], "videos": videos}
    compare(ours(**options), theirs(**options, return_tensors="pt"))


def test_what_is_saved_is_read_by_transformers(both, tmp_path):
    ours, theirs = both
    ours.save_pretrained(tmp_path)
    read = AutoProcessor.from_pretrained(tmp_path)
    assert type(read) is type(theirs)
    assert read.chat_template == theirs.chat_template
    for part in ("image_processor", "video_processor"):
        assert dict(getattr(read, part).size) == dict(getattr(theirs, part).size)
        assert type(getattr(read, part)) is type(getattr(theirs, part))
    options = {"text": TEXT, "images": noise(112, 84), "videos": [[noise(56, 56)] * 2], "return_tensors": "pt"}
    for name, value in theirs(**options).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(read(**options)[name])), name


def test_conversations(both):
    ours, theirs = both
    parts = [{"type": "image", "image": noise(84, 56)}, {"type": "video", "video": [noise(56, 56)] * 3}]
    messages = [
        [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}],
        [{"role": "user", "content": "x"}],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    options["processor_kwargs"] = {"padding": True}
    compare(ours.apply_chat_template(messages, **options), theirs.apply_chat_template(messages, **options))


def test_on_a_device(both, monkeypatch):
    """The CPU in the place of one."""
    for module in (image_processor, image_text_processor, video_processor):
        monkeypatch.setattr(module, "is_elsewhere", lambda device: device is not None)
    ours, theirs = both
    visuals = {"images": noise(112, 84), "videos": [[noise(112, 84, seed) for seed in range(9)]]}
    got = ours(text=TEXT, **visuals, device="cpu")
    compare(got, theirs(text=TEXT, **visuals, device="cpu", return_tensors="pt"))
