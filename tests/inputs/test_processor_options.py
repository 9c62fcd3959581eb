"""Options of the processor without torchvision, what it is given and gives, and transformers' pipeline over it."""

import inspect
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, ProcessorMixin, Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil, pipeline

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import ImageTextProcessor, load_model, load_processor
from sparsevlm.inputs.video_processor import PilVideoProcessor
from sparsevlm.inputs.visuals import flat_images, flat_videos
from sparsevlm.scenes import draw_scene
from tiny_checkpoint import save_tiny_checkpoint

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
SMALL = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height // 7, width // 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


PHOTO = noise(640, 427)


@pytest.fixture(scope="module")
def processor():
    return ImageTextProcessor.from_folder(bundled_path())


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Of Qwen2-VL, whose videos come without seconds."""
    return ImageTextProcessor.from_folder(save_tiny_checkpoint(tmp_path_factory.mktemp("older"), "qwen2_vl"))


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ({}, [1, 30, 46]),
        ({"max_pixels": 50176}, [1, 12, 18]),
        ({"max_pixels": 50176, "min_pixels": 3136}, [1, 12, 18]),
        ({"images_kwargs": {"max_pixels": 50176}}, [1, 12, 18]),
        ({"size": {"shortest_edge": 3136, "longest_edge": 50176}}, [1, 12, 18]),
        ({"size": {"shortest_edge": 3136, "longest_edge": 10**6}, "max_pixels": 50176}, [1, 12, 18]),
        ({"images_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 50176}}}, [1, 12, 18]),
        ({"min_pixels": 560 * 840}, [1, 42, 60]),
        ({"images_kwargs": {"min_pixels": 560 * 840}}, [1, 42, 60]),
        ({"videos_kwargs": {"max_pixels": 50176}}, [1, 30, 46]),
        ({"common_kwargs": {"max_pixels": 50176}}, [1, 12, 18]),
        ({"max_pixels": None}, [1, 30, 46]),
        ({"images_kwargs": None}, [1, 30, 46]),
    ],
    ids=str,
)
def test_bounds_on_the_pixels(processor, options, grid):
    inputs = processor(text=IMAGE_TOKEN, images=PHOTO, **options)
    assert inputs["image_grid_thw"].tolist() == [grid]
    assert (inputs["input_ids"] == processor.image_token_id).sum() == grid[1] * grid[2] // 4
    assert processor.image_processor.size["longest_edge"] == 802816, "the processor itself is not changed"


def test_bounds_on_a_video(processor):
    frames = [noise(280, 280, seed) for seed in range(2)]
    wide = processor(text=VIDEO_TOKEN, videos=frames)
    assert wide["video_grid_thw"].tolist() == [[1, 20, 20]]
    for options in ({"max_pixels": 12544}, {"videos_kwargs": {"max_pixels": 12544}}, {"size": {**SMALL}}):
        assert processor(text=VIDEO_TOKEN, videos=frames, **options)["video_grid_thw"].tolist() == [[1, 8, 8]]
    assert processor(text=VIDEO_TOKEN, videos=frames, images_kwargs={"max_pixels": 12544})["video_grid_thw"][0, 1] == 20


def test_bounds_that_the_plugin_of_lmms_eval_sets(older):
    from sparsevlm.inputs.pixel_bounds import bound_pixels

    bound_pixels(older, None, 28 * 28 * 9)
    for inputs in (older(text=IMAGE_TOKEN, images=PHOTO), older(text=VIDEO_TOKEN, videos=[PHOTO])):
        assert all(grid.prod() <= 4 * 9 for name, grid in inputs.items() if name.endswith("_grid_thw"))
    assert older.video_size == {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 9}


def test_what_is_done_to_the_pixels(processor):
    image = Image.fromarray(np.arange(56 * 56 * 3, dtype=np.uint32).reshape(56, 56, 3).astype(np.uint8))
    raw = processor(images=image, do_rescale=False, do_normalize=False, size=SMALL)["pixel_values"]
    assert raw.unique().tolist() == list(range(256))
    scaled = processor(images=image, images_kwargs={"do_normalize": False}, size=SMALL)["pixel_values"]
    assert torch.allclose(scaled, raw / 255)
    own = processor(images=image, image_mean=[0.0] * 3, image_std=[0.5] * 3, size=SMALL)["pixel_values"]
    assert torch.allclose(own, raw / 127.5)
    assert processor(images=image, do_resize=False)["image_grid_thw"].tolist() == [[1, 4, 4]]
    with pytest.raises(ValueError, match="image 1 has 57x56 pixels, and do_resize=False takes multiples of 28"):
        processor(images=image.resize((57, 56)), do_resize=False)
    with pytest.raises(ValueError, match="video 1 has 56x57 pixels, and do_resize=False"):
        processor(videos=[[image.resize((56, 57))]], do_resize=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"max_pixel": 5},
            TypeError,
            r"unknown option max_pixel\. Did you mean max_pixels\? Known are add_special_tokens, ",
        ),
        ({"quality": 5}, TypeError, r"unknown option quality\. Known are .*do_resize, .*text_kwargs, .*videos_kwargs"),
        (
            {"images_kwargs": {"max_pixel": 5}},
            TypeError,
            "unknown option max_pixel in images_kwargs. Did you mean max_pixels",
        ),
        ({"text_kwargs": {"paddings": 5}}, TypeError, "unknown option paddings in text_kwargs. Did you mean padding"),
        ({"text_kwargs": {"max_pixels": 5}}, TypeError, "unknown option max_pixels in text_kwargs"),
        ({"videos_kwargs": {"frames": 5}}, TypeError, "unknown option frames in videos_kwargs"),
        ({"common_kwargs": {"paddings": 5}}, TypeError, "unknown option paddings"),
        ({"audio_kwargs": {}}, TypeError, "unknown option audio_kwargs"),
        ({"images_kwargs": 5}, TypeError, "images_kwargs must be a dict of options, got int"),
        ({"common_kwargs": 5}, TypeError, "common_kwargs must be a dict of options, got int"),
        ({"do_resize": "yes"}, TypeError, "'do_resize' with value 'yes'"),
        ({"max_pixels": "many"}, TypeError, "'size' with value .*'many'"),
        ({"size": 224, "max_pixels": 5}, TypeError, "size must be a dict with shortest_edge and longest_edge, got 224"),
        ({"size": {"height": 5, "width": 5}}, ValueError, "must contain 'shortest_edge' and 'longest_edge'"),
        (
            {"max_pixels": 5, "images_kwargs": {"max_pixels": 6}},
            ValueError,
            "max_pixels was given twice, in images_kwargs",
        ),
        ({"padding": True, "text_kwargs": {"padding": True}}, ValueError, "padding was given twice, in text_kwargs"),
        ({"do_center_crop": True}, ValueError, "do_center_crop=True has no effect"),
        ({"images_kwargs": {"pad_size": {"height": 5, "width": 5}}}, ValueError, "pad_size=.* has no effect"),
        ({"device": "gpu"}, ValueError, "unknown device 'gpu'"),
        ({"images_kwargs": {"device": "cuda:99"}}, ValueError, "device cuda:99 was asked for, but torch finds"),
        ({"return_tensors": "tf"}, ValueError, "tf is not a valid"),
        ({"truncation": True, "max_length": 100}, ValueError, "`image` token count .*increase `max_length`"),
        ({"truncation": "longest_first", "max_length": 5}, ValueError, "`image` token count"),
        ({"text_kwargs": {"truncation": True, "max_length": 100}}, ValueError, "`image` token count"),
        ({"audio": np.zeros(5)}, ValueError, "takes no audio"),
    ],
    ids=str,
)
def test_options_that_are_refused(processor, options, error, message):
    with pytest.raises(error, match=message):
        processor(text=IMAGE_TOKEN, images=PHOTO, **options)


def test_every_option_of_transformers_is_known(processor):
    """Those that its processor declares, by hand and version: nothing is refused as unknown that it takes."""
    declared = Qwen2_5_VLProcessor.valid_processor_kwargs.__annotations__
    for modality in ("text_kwargs", "images_kwargs", "videos_kwargs"):
        for name in declared[modality].__annotations__:
            processor(text="a", **{modality: {name: None}} if name in ("device", "size") else {modality: {}})
    processor(
        text="a", do_center_crop=False, crop_size=None, device="cpu", return_mm_token_type_ids=True, verbose=False
    )


def test_truncation_of_what_comes_after_the_images(processor):
    text = f"{IMAGE_TOKEN} what is in the picture"
    whole = processor(text=text, images=PHOTO, size=SMALL)["input_ids"]
    n_visual = int((whole == processor.image_token_id).sum())
    cut = processor(text=text, images=PHOTO, size=SMALL, truncation=True, max_length=n_visual + 2)["input_ids"]
    assert torch.equal(cut, whole[:, : n_visual + 2])
    with pytest.raises(ValueError, match="`image` token count"):
        processor(text=text, images=PHOTO, size=SMALL, truncation=True, max_length=n_visual - 1)
    with pytest.raises(ValueError, match="`video` token count"):
        processor(text=VIDEO_TOKEN, videos=[PHOTO] * 2, truncation=True, max_length=5)


def test_padding(processor):
    texts = [f"{IMAGE_TOKEN} a", "what is in the picture"]
    for options in ({"padding": True}, {"text_kwargs": {"padding": "longest"}}):
        mask = processor(text=texts, images=PHOTO, size=SMALL, **options)["attention_mask"]
        assert mask[1, 0] == 0
        assert mask[:, -1].tolist() == [1, 1]
    for options in (
        {"padding": True, "padding_side": "right"},
        {"text_kwargs": {"padding": True, "padding_side": "right"}},
    ):
        assert processor(text=texts, images=PHOTO, size=SMALL, **options)["attention_mask"][1].tolist()[-1] == 0
    long = processor(text="a", padding="max_length", max_length=50)
    assert long["input_ids"].shape == long["mm_token_type_ids"].shape == (1, 50)
    assert processor(text=texts[1], padding=True, pad_to_multiple_of=32)["input_ids"].shape[1] % 32 == 0
    with pytest.raises(ValueError, match="padding=True"):
        processor(text=texts, images=PHOTO)


@pytest.mark.parametrize(("kind", "tensor"), [("pt", torch.Tensor), ("np", np.ndarray)])
def test_tensors(processor, kind, tensor):
    options = {"text": f"{IMAGE_TOKEN}{VIDEO_TOKEN}", "images": PHOTO, "videos": [PHOTO] * 2, "size": SMALL}
    inputs = processor(**options, return_tensors=kind)
    assert {type(value) for value in inputs.values()} == {tensor}
    assert set(inputs) == {
        *("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"),
        *("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"),
    }
    assert set(inputs) == set(processor.model_input_names)
    assert inputs["input_ids"].dtype == inputs["mm_token_type_ids"].dtype
    as_lists = processor(**options, return_tensors=None)
    assert as_lists["input_ids"] == inputs["input_ids"].tolist()
    assert as_lists["mm_token_type_ids"] == inputs["mm_token_type_ids"].tolist()
    nested = processor(**options, text_kwargs={"return_tensors": kind}, images_kwargs={"return_tensors": kind})
    assert isinstance(nested["input_ids"], tensor)


@pytest.mark.parametrize("text", ["one prompt", ["one prompt"], ("one prompt",)])
def test_one_prompt_or_a_list(processor, text):
    assert processor(text=text)["input_ids"].shape[0] == 1
    assert processor(None, text)["input_ids"].shape[0] == 1, "images come first, text second"


@pytest.mark.parametrize(("text", "got"), [(5, "int"), ([5], "int"), ([["a", "b"]], "list"), ([None], "NoneType")])
def test_text_that_is_none(processor, text, got):
    with pytest.raises(TypeError, match=f"text must be a prompt or a list of prompts, got {got}"):
        processor(text=text)


def test_images_alone(processor):
    assert set(processor(images=PHOTO)) == {"pixel_values", "image_grid_thw"}
    assert set(processor(videos=[PHOTO])) == {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts"}
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=[], videos=[])


SHAPES = {
    "one": lambda a, b: a,
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "list for each prompt": lambda a, b: [[a], [b]],
    "deeper": lambda a, b: [[[a]], [[b]]],
    "arrays": lambda a, b: [np.asarray(a), np.asarray(b)],
    "arrays, channels first": lambda a, b: [np.asarray(a).transpose(2, 0, 1), np.asarray(b).transpose(2, 0, 1)],
    "tensors": lambda a, b: [torch.from_numpy(np.array(a)), torch.from_numpy(np.array(b))],
    "tensors that need gradients": lambda a, b: [
        torch.from_numpy(np.array(one)).float().requires_grad_() for one in (a, b)
    ],
    "array of two": lambda a, b: np.stack([np.asarray(a), np.asarray(b)]),
    "mixed": lambda a, b: [a, np.asarray(b)],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_images_in_any_nesting(processor, shape):
    one, other = noise(84, 56), noise(84, 56, 1)
    texts = [IMAGE_TOKEN] if shape == "one" else [IMAGE_TOKEN, f"a {IMAGE_TOKEN}"]
    wanted = processor(text=texts, images=[one, other][: len(texts)], padding=True)
    got = processor(text=texts, images=SHAPES[shape](one, other), padding=True)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_paths(processor, tmp_path):
    noise(84, 56).save(tmp_path / "a.png")
    wanted = processor(text=IMAGE_TOKEN, images=noise(84, 56))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()):
        assert torch.equal(processor(text=IMAGE_TOKEN, images=source)["pixel_values"], wanted["pixel_values"])
        assert torch.equal(processor(text=IMAGE_TOKEN, images=[[source]])["pixel_values"], wanted["pixel_values"])
    for address in ("https://example.org/a.png", Path("https://example.org/a.png")):
        with pytest.raises(ValueError, match="is on the network; download it and give its path"):
            processor(text=IMAGE_TOKEN, images=address)
        with pytest.raises(ValueError, match="is on the network"):
            processor(text=VIDEO_TOKEN, videos=address)
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        processor(text=IMAGE_TOKEN, images=["gone.png"])


def test_videos_by_their_paths(processor, tmp_path):
    frames = [noise(56, 56, seed) for seed in range(4)]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for number, frame in enumerate(frames):
            frame.save(tmp_path / folder / f"{number}.png")
    paths = [str(tmp_path / "one" / f"{number}.png") for number in range(4)]
    texts = {1: VIDEO_TOKEN, 2: [VIDEO_TOKEN, VIDEO_TOKEN]}
    for n_videos, videos in (
        (1, tmp_path / "one"),
        (1, frames),
        (1, [frames]),
        (1, [paths]),
        (1, [np.stack([np.asarray(frame) for frame in frames])]),
        (2, [str(tmp_path / "one"), str(tmp_path / "two")]),
        (2, [[tmp_path / "one"], [tmp_path / "two"]]),
        (2, [paths, paths]),
        (2, [[frames], [frames]]),
    ):
        inputs = processor(text=texts[n_videos], videos=videos, size=SMALL)
        assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]] * n_videos
        wanted = processor(text=VIDEO_TOKEN, videos=[frames], size=SMALL)["pixel_values_videos"].repeat(n_videos, 1)
        assert torch.equal(inputs["pixel_values_videos"], wanted)
    with pytest.raises(FileNotFoundError, match="a file with one image; give a folder"):
        processor(text=[VIDEO_TOKEN] * 4, videos=paths)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (5, TypeError, "image 1 must be a PIL image, a path, the bytes of an image file, or an array .*, got int"),
        ([[[0, 0, 0], [9, 9, 9]]], TypeError, "image 1 must be .*, got int"),
        (np.zeros((8, 8)), ValueError, r"image 1 must be an array of .*, got \(8, 8\)"),
        (np.zeros((8, 8, 2)), ValueError, "with 1, 3 or 4 channels"),
        (
            np.full((8, 8, 3), 4095, np.uint16),
            ValueError,
            "image 1 is an array of uint16 from 4095 to 4095; scale it to 0 to 255",
        ),
        (np.full((8, 8, 3), -1, np.int16), ValueError, "from -1 to -1"),
        (np.ones((8, 8, 3), bool), ValueError, "array of bool"),
        (Image.new("RGB", (603, 3)), ValueError, "image 1 has 603x3 pixels, .* up to 200 to 1; crop it"),
    ],
)
def test_images_that_are_none(processor, images, error, message):
    with pytest.raises(error, match=message):
        processor(text=IMAGE_TOKEN, images=images)


@pytest.mark.parametrize(
    ("videos", "error", "message"),
    [
        (5, TypeError, "video 1 must be a list of frames, a folder of images, .*, got int"),
        ([[PHOTO, 5]], TypeError, "frame 1 of video 1 must be a PIL image, .*, got int"),
        ([[PHOTO, np.asarray(PHOTO)]], TypeError, "video 1 mixes arrays with other frames"),
        (
            [[np.zeros((8, 8, 3)), np.zeros((8, 9, 3))]],
            ValueError,
            r"of one size, got arrays of \[\(3, 8, 8\), \(3, 8, 9\)\]",
        ),
        ([[Image.new("RGB", (603, 3))]], ValueError, "video 1 has 603x3 pixels"),
    ],
    ids=["number", "number among frames", "mixed", "sizes", "strip"],
)
def test_videos_that_are_none(processor, videos, error, message):
    with pytest.raises(error, match=message):
        processor(text=VIDEO_TOKEN, videos=videos)


def test_images_of_the_wrong_prompt(processor):
    texts = [IMAGE_TOKEN, f"{IMAGE_TOKEN}{IMAGE_TOKEN}"]
    with pytest.raises(ValueError, match=r"prompt 1 holds 1 times .*, but its list has 2 images"):
        processor(text=texts, images=[[PHOTO, PHOTO], [PHOTO]], padding=True)
    assert len(processor(text=texts, images=[[PHOTO], [PHOTO, PHOTO]], padding=True)["image_grid_thw"]) == 3


def test_arrays_with_other_channels():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    assert np.array_equal(flat_images(grey)[0], grey.transpose(2, 0, 1).repeat(3, axis=0))
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:4, :, 3] = 255
    (blended,) = flat_images(clear)
    assert blended.shape == (3, 8, 8)
    assert sorted(np.unique(blended)) == [0, 255]
    assert blended[0, 0, 0] == 0
    halves = np.zeros((4, 8, 8), np.float32)
    halves[3] = 0.5
    assert np.allclose(flat_images(halves)[0], 0.5)
    assert flat_images(np.zeros((1, 8, 3), np.uint8))[0].shape == (3, 1, 8), "colours before a side of one pixel"
    assert flat_images(np.zeros((3, 8, 3), np.uint8))[0].shape == (3, 8, 3)
    last = flat_images(np.zeros((3, 8, 3), np.uint8), "channels_last")
    assert last[0].shape == (3, 3, 8)
    with pytest.raises(ValueError, match="got \\(8, 8, 3\\) with input_data_format='channels_first'"):
        flat_images(np.zeros((8, 8, 3)), "channels_first")
    assert flat_videos(np.zeros((5, 8, 8, 1), np.uint8))[0].shape == (5, 3, 8, 8)
    assert flat_videos(np.zeros((2, 5, 3, 8, 8), np.uint8))[1].shape == (5, 3, 8, 8)


def test_input_data_format(processor):
    image = np.asarray(noise(84, 56))
    wanted = processor(images=image)["pixel_values"]
    for options in ({"input_data_format": "channels_last"}, {"images_kwargs": {"input_data_format": "channels_last"}}):
        assert torch.equal(processor(images=image, **options)["pixel_values"], wanted)
        with pytest.raises(ValueError, match="must be an array of"):
            processor(images=image.transpose(2, 0, 1), **options)


def test_floats_up_to_one_are_said(processor):
    image = np.asarray(noise(84, 56)) / 255
    with pytest.warns(UserWarning, match="^sparsevlm: image 1 is an array of floats up to 1 .*do_rescale=False"):
        processor(images=image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = processor(images=image, do_rescale=False)["pixel_values"]
        processor(images=np.asarray(noise(84, 56)).astype(np.float32))
    assert torch.allclose(got, processor(images=noise(84, 56))["pixel_values"], atol=1e-5)


def test_half_precision_tensors(processor):
    image = torch.from_numpy(np.array(noise(84, 56)))
    got = processor(images=image.bfloat16())["pixel_values"]
    assert torch.equal(got, processor(images=image.float())["pixel_values"]), (
        "bfloat16 holds all whole numbers up to 256"
    )


def test_metadata_of_videos(processor, older):
    frames = [noise(56, 56, seed) for seed in range(8)]
    options = {"text": VIDEO_TOKEN, "videos": [frames], "size": SMALL}
    for metadata, seconds in (
        (None, 2 / 24),
        ([{"fps": 2.0}], 1.0),
        ({"fps": 2.0}, 1.0),
        ([[{"fps": 2.0}]], 1.0),
        ([{"fps": 8.0, "total_num_frames": 32, "frames_indices": list(range(0, 32, 4))}], 1.0),
    ):
        assert processor(**options, video_metadata=metadata)["second_per_grid_ts"].tolist() == pytest.approx([seconds])
        assert "second_per_grid_ts" not in older(**options, video_metadata=metadata)
    assert "second_per_grid_ts" not in older.model_input_names
    assert "video_metadata" not in processor(**options)
    assert len(processor(**options, return_metadata=True)["video_metadata"]) == 1


def test_sampling_of_frames(processor):
    frames = [Image.new("RGB", (56, 56), (number,) * 3) for number in range(10)]
    options = {"text": VIDEO_TOKEN, "videos": [frames], "do_rescale": False, "do_normalize": False, "size": SMALL}

    def sampled(**sampling):
        inputs = processor(**options, do_sample_frames=True, **sampling)
        return inputs["pixel_values_videos"].unique().int().tolist(), inputs["second_per_grid_ts"].tolist()

    assert sampled(num_frames=4)[0] == [0, 2, 5, 7]
    assert sampled(num_frames=5)[0] == [0, 2, 5, 7], "a multiple of two"
    metadata = [{"fps": 5.0, "total_num_frames": 10}]
    assert sampled(fps=3.0, video_metadata=metadata) == ([0, 1, 3, 5, 6, 8], pytest.approx([2 / 3]))
    assert sampled(fps=0.1, video_metadata=metadata)[0] == [0, 2, 5, 7], "no fewer than min_frames"
    assert sampled() == (list(range(10)), pytest.approx([2 / 24]))
    for sampling, message in (
        ({"num_frames": 12}, "12 frames cannot be sampled from a video of 10"),
        ({"num_frames": 1, "temporal_patch_size": 4}, "0 frames cannot be sampled"),
        ({"fps": 3.0}, "give video_metadata"),
        ({"fps": 3.0, "num_frames": 4, "video_metadata": metadata}, "give one of them"),
        ({"num_frames": 4, "video_metadata": [{"total_num_frames": 90}]}, "a video of 90 frames came with 10 of them"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(**sampling)


def test_a_cap_on_the_pixels_of_a_video(processor):
    frames = [noise(280, 280)] * 8
    options = {"text": VIDEO_TOKEN, "videos": [frames]}
    assert processor(**options)["video_grid_thw"].tolist() == [[4, 20, 20]]
    capped = processor(**options, cap_pixels_per_frame=True, max_video_tokens=100)["video_grid_thw"]
    assert capped.tolist() == [[4, 8, 8]], "0.9 * 100 tokens for four steps: 22 of 5 by 4 and less"
    assert processor.video_processor.get_number_of_video_patches(7, 280, 280) == 4 * 20 * 20
    small = {"size": SMALL, "temporal_patch_size": 1}
    assert processor.video_processor.get_number_of_video_patches(7, 280, 280, small) == 7 * 8 * 8


def test_what_was_given_is_not_changed(processor):
    options = {"images_kwargs": {"max_pixels": 50176}, "text_kwargs": {"padding": True}, "videos_kwargs": {"fps": 2.0}}
    before, texts = json.dumps(options), [IMAGE_TOKEN]
    processor(text=texts, images=PHOTO, **options)
    assert json.dumps(options) == before
    assert texts == [IMAGE_TOKEN]


def test_is_a_processor_of_transformers(processor):
    assert isinstance(processor, (ProcessorMixin, Qwen2_5_VLProcessor))
    assert isinstance(processor.video_processor, PilVideoProcessor)
    assert pickle.loads(pickle.dumps(processor)).to_dict() == processor.to_dict()
    names = list(inspect.signature(Qwen2_5_VLProcessor.__call__).parameters)[:4]
    assert list(inspect.signature(type(processor).__call__).parameters)[:4] == names
    with pytest.raises(TypeError, match="video_processor must be a PilVideoProcessor, got PilImageProcessor"):
        ImageTextProcessor(processor.tokenizer, processor.image_processor, video_processor=processor.image_processor)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_saved_and_read_back(tmp_path, family):
    made = ImageTextProcessor.from_folder(save_tiny_checkpoint(tmp_path / "checkpoint", family))
    made.save_pretrained(tmp_path / "saved")
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    name = "Qwen2VLProcessor" if family == "qwen2_vl" else "Qwen2_5_VLProcessor"
    config = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert config["processor_class"] == name
    assert config["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
    assert config["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert "image_processor_type" not in config["video_processor"]
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["processor_class"] == name
    options = {"text": [f"{IMAGE_TOKEN}{VIDEO_TOKEN}"], "images": PHOTO, "videos": [[PHOTO] * 3]}
    wanted = made(**options)
    read = [
        ImageTextProcessor.from_folder(tmp_path / "saved"),
        ImageTextProcessor.from_pretrained(tmp_path / "saved"),
        load_processor(tmp_path / "saved"),
    ]
    for one in read:
        if isinstance(one, ImageTextProcessor):
            assert one.to_dict() == made.to_dict()
            assert one.returns_seconds == (family == "qwen2_5_vl")
        assert one.chat_template == made.chat_template
        got = one(**options, return_tensors="pt")
        assert torch.equal(got["input_ids"], wanted["input_ids"])
        assert set(got) == set(wanted)
    assert Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "saved").to_dict() == made.image_processor.to_dict()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved")) == len(made.tokenizer)
    with pytest.raises(NotImplementedError, match="call push_to_hub"):
        made.save_pretrained(tmp_path / "saved", push_to_hub=True)


def test_a_folder_without_a_processor(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json and no processor_config\.json"):
        ImageTextProcessor.from_pretrained(tmp_path)


def test_decoding(processor):
    ids = processor.tokenizer(["what is in the picture", "a"], padding=True)["input_ids"]
    words = processor.post_process_image_text_to_text(ids)
    assert words == processor.batch_decode(ids, skip_special_tokens=True)
    assert processor.post_process_image_text_to_text(torch.tensor(ids)) == words
    assert processor.post_process_image_text_to_text(np.array(ids)) == words


@pytest.fixture(scope="module")
def pipe(processor):
    model = load_model(bundled_path(), dtype="float32", device="cpu")
    return pipeline("image-text-to-text", model=model, processor=processor)


def asked(seed):
    scene = draw_scene(seed)
    question = scene.question("number")
    parts = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]
    return scene, question, [{"role": "user", "content": parts}]


def test_pipeline_of_transformers(pipe, processor, tmp_path):
    scene, question, messages = asked(8)
    options = {"max_new_tokens": 8, "return_full_text": False}
    assert pipe(text=messages, **options)[0]["generated_text"] == question.answer
    other = asked(9)
    several = pipe(text=[messages, other[2]], **options)
    assert [one[0]["generated_text"] for one in several] == [question.answer, other[1].answer]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert pipe(images=scene.image, text=prompt, **options)[0]["generated_text"] == question.answer
    scene.image.save(tmp_path / "scene.png")
    named = [
        {"role": "user", "content": [{"type": "image", "path": str(tmp_path / "scene.png")}, messages[0]["content"][1]]}
    ]
    assert pipe(text=named, **options)[0]["generated_text"] == question.answer
    full = pipe(text=messages, max_new_tokens=8)[0]["generated_text"]
    assert full[-1] == {"role": "assistant", "content": question.answer}
    small = {"size": {"shortest_edge": 784, "longest_edge": 28 * 28 * 9}}
    assert pipe.preprocess(_chat(messages), processor_kwargs=small)["image_grid_thw"].prod() <= 36


def test_pipeline_of_transformers_with_pruning(pipe, processor):
    _, question, messages = asked(8)
    with apply_sparsevlm(pipe.model, keep=0.5, processor=processor) as state:
        assert pipe(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"] == question.answer
    assert state.report.n_visual == 256
    assert state.report.average_in <= 0.5 * 256 + 1


def _chat(messages):
    from transformers.utils.chat_template_utils import Chat

    return Chat(messages)
