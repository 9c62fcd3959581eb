"""Processor without torchvision: the same inputs as transformers' own, batches, video, chat messages."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor

from sparsevlm.inputs import ImageTextProcessor, load_model
from sparsevlm.inputs.video_processor import PilVideoProcessor
from tiny_checkpoint import save_tiny_checkpoint

TEXTS = ["one <|image_pad|> and <|video_pad|>", "two <|image_pad|><|image_pad|>", "none", "<|video_pad|> seen"]


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height // 7, width // 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="module")
def processor(folder):
    return ImageTextProcessor.from_folder(folder)


@pytest.fixture(scope="module")
def media():
    images = [noise(112, 84), noise(84, 140, 1), noise(56, 56, 2)]
    videos = [[noise(112, 84, seed) for seed in range(5)], [noise(56, 84, seed) for seed in range(4)]]
    return images, videos


def transformers_processor(cls, processor):
    """The real processor class; only its check that a torchvision video processor came with it is left out."""

    class WithoutCheck(cls):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    return WithoutCheck(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=processor.video_processor,
        chat_template=processor.chat_template,
    )


@pytest.mark.parametrize("rates", [None, [2.0, 8.0]])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
def test_same_inputs_as_transformers(tmp_path, media, family, rates):
    ours = ImageTextProcessor.from_folder(save_tiny_checkpoint(tmp_path, family))
    # Its class is ours; what is between the call and the image processor is theirs.
    theirs = transformers_processor(Qwen2VLProcessor if family == "qwen2_vl" else Qwen2_5_VLProcessor, ours)
    images, videos = media
    options = {"text": TEXTS, "images": images, "videos": videos, "padding": True, "return_tensors": "pt"}
    if rates is not None:
        options["video_metadata"] = [
            {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
            for fps, frames in zip(rates, videos, strict=True)
        ]
    ours.tokenizer.padding_side = "left"
    got, wanted = ours(**options), theirs(**options)
    wanted.pop("video_metadata", None)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(got[name], torch.as_tensor(value)), name


def test_deep_greys_are_scaled(processor):
    ramp = np.arange(56 * 56).reshape(56, 56) % 256
    deep, shallow = Image.fromarray((ramp * 257).astype(np.uint16)), Image.fromarray(ramp.astype(np.uint8))
    text = "<|image_pad|><|video_pad|>"
    got, wanted = (processor(text=text, images=[one], videos=[one, one]) for one in (deep, shallow))
    for name in ("pixel_values", "pixel_values_videos"):
        assert torch.equal(got[name], wanted[name])


def test_batch_is_padded_on_the_left_whatever_the_tokenizer_says(processor, media):
    images, videos = media
    processor.tokenizer.padding_side = "right"
    inputs = processor(text=TEXTS, images=images, videos=videos, padding=True)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == inputs["mm_token_type_ids"].shape
    for row, text in zip(inputs["attention_mask"], TEXTS, strict=True):
        assert row[-1] == 1, text
        assert torch.equal(row, row.sort().values), text
    image_tokens = inputs["image_grid_thw"].prod(-1) // 4
    video_tokens = inputs["video_grid_thw"].prod(-1) // 4
    counted = [[int((row == kind).sum()) for kind in (1, 2)] for row in inputs["mm_token_type_ids"]]
    assert counted == [
        [int(image_tokens[0]), int(video_tokens[0])],
        [int(image_tokens[1] + image_tokens[2]), 0],
        [0, 0],
        [0, int(video_tokens[1])],
    ]
    assert inputs["pixel_values"].shape[0] == 4 * image_tokens.sum()


def test_video_layout_is_the_one_of_transformers(processor):
    """Against the formula of Qwen2VLVideoProcessor.patchify, on frames that need no resizing."""
    frames = [noise(112, 84, seed) for seed in range(3)]
    cut = processor.video_processor([frames], size={"shortest_edge": 56 * 56, "longest_edge": 10**6})
    patches = cut["pixel_values_videos"]
    assert cut["video_grid_thw"].tolist() == [[2, 6, 8]]
    mean, std = (
        np.array(values) for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    stacked = np.stack([(np.asarray(frame) / 255 - mean) / std for frame in [*frames, frames[-1]]])
    video = torch.from_numpy(stacked).permute(0, 3, 1, 2)[None]
    wanted = video.reshape(1, 2, 2, 3, 3, 2, 14, 4, 2, 14).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(2 * 48, -1)
    assert np.allclose(patches, wanted.numpy(), atol=1e-5)


def test_frames_have_their_own_size_bounds(tmp_path, folder):
    processor = ImageTextProcessor.from_folder(folder)
    assert processor.video_size == {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 96}, "the image's, as there"
    copy = save_tiny_checkpoint(tmp_path)
    (copy / "video_preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 6272}')
    processor = ImageTextProcessor.from_folder(copy)
    inputs = processor(text="<|video_pad|>", videos=[noise(280, 280)] * 2)
    assert inputs["video_grid_thw"].prod() * 14 * 14 <= 6272
    (copy / "processor_config.json").write_text(
        '{"video_processor": {"size": {"shortest_edge": 1, "longest_edge": 3136}}}'
    )
    assert ImageTextProcessor.from_folder(copy).video_size == {"shortest_edge": 1, "longest_edge": 3136}
    default = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}  # of Qwen2VLVideoProcessor
    assert ImageTextProcessor(processor.tokenizer, processor.image_processor).video_size == default
    assert PilVideoProcessor().size == default
    own = ImageTextProcessor(
        processor.tokenizer, processor.image_processor, {"shortest_edge": 784, "longest_edge": 1568}
    )
    assert own(text="<|video_pad|>", videos=[noise(280, 280)] * 2)["video_grid_thw"].prod() * 14 * 14 <= 1568


def test_chat_messages_bring_their_pictures(processor, tmp_path):
    picture, frames = noise(84, 56), [noise(56, 56, seed) for seed in range(2)]
    picture.save(tmp_path / "picture.png")
    (tmp_path / "video").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "video" / f"{number}.png")

    def messages(image, video):
        parts = [
            {"type": "image", "image": image},
            {"type": "video", "video": video},
            {"type": "text", "text": "What?"},
        ]
        return [{"role": "user", "content": parts}]

    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    from_memory = processor.apply_chat_template(messages(picture, frames), **options)
    from_disk = processor.apply_chat_template(messages(tmp_path / "picture.png", str(tmp_path / "video")), **options)
    theirs = transformers_processor(Qwen2_5_VLProcessor, processor).apply_chat_template(
        messages(picture, frames), **options
    )
    for name in from_memory:
        assert torch.equal(from_memory[name], from_disk[name])
        assert torch.equal(from_memory[name], torch.as_tensor(theirs[name]))
    assert processor.decode(from_memory["input_ids"][0]).endswith("<|im_start|>assistant\n")
    assert processor.batch_decode(from_memory["input_ids"], skip_special_tokens=True)[0].endswith("assistant\n")


def test_batch_of_conversations(processor):
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": noise(56, 56)}, {"type": "text", "text": "a"}]}],
        [{"role": "user", "content": "only text, and more of it"}],
    ]
    inputs = processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, processor_kwargs={"padding": True}
    )
    assert inputs["input_ids"].shape[0] == 2
    ids = processor.apply_chat_template(conversations[1], tokenize=True)
    assert torch.equal(inputs["input_ids"][1, -ids.shape[1] :], ids[0])


def test_padding_does_not_move_positions(folder, processor):
    """M-RoPE positions of a sample are the same alone and in a batch: the token types are right."""
    model = load_model(folder, device="cpu")
    images = [noise(112, 84), noise(84, 140, 1)]
    texts = [
        "<|vision_start|><|image_pad|><|vision_end|> a",
        "<|vision_start|><|image_pad|><|vision_end|> a longer text",
    ]
    batch = processor(text=texts, images=images, padding=True)
    alone = processor(text=texts[:1], images=images[:1])

    def positions(inputs):
        wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return model.model.get_rope_index(**{name: inputs[name] for name in wanted})[0]

    length = alone["input_ids"].shape[1]
    assert torch.equal(positions(batch)[:, 0, -length:], positions(alone)[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "<|image_pad|>"}, "holds 1 times"),
        ({"text": "nothing", "images": [noise(56, 56)]}, "1 were given"),
        ({"text": "<|video_pad|>", "videos": [[noise(56, 56), noise(84, 56)]]}, "of one size, got 56x56, 84x56"),
        ({"text": "<|video_pad|>", "videos": [[noise(56, 56)]], "video_metadata": []}, "1 videos, but metadata of 0"),
        ({"text": None}, "text is missing"),
        ({"text": "a", "return_tensors": "tf"}, "tf is not a valid"),
        ({"text": ""}, "an empty one"),
        ({"text": ["a", ""]}, "an empty one"),
        ({"text": []}, "holds no prompt"),
    ],
)
def test_what_does_not_fit_is_said(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor(**options)


def test_no_network_for_pictures(processor):
    content = [{"type": "image", "url": "https://example.org/cat.png"}]
    with pytest.raises(ValueError, match="only local files"):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)


def test_chat_template_in_its_own_file(tmp_path):
    folder = save_tiny_checkpoint(tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        ImageTextProcessor.from_folder(folder).apply_chat_template([{"role": "user", "content": "hi"}])
    (folder / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}!"}')
    text = ImageTextProcessor.from_folder(folder).apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "hi!"


def test_tokenizer_of_another_family(processor):
    class Tokenizer:
        chat_template = None

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(ValueError, match="does not know"):
        ImageTextProcessor(Tokenizer(), processor.image_processor)
