"""Parts of chat messages: every way to name an image or video, and what is said of the others."""

import base64
import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image

from sparsevlm.inputs import ImageTextProcessor
from sparsevlm.inputs.chat import read_conversations
from tiny_checkpoint import save_tiny_checkpoint

OPTIONS = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
TEXT = {"type": "text", "text": "What?"}


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (height // 7, width // 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


IMAGE, FRAMES = noise(84, 56), [noise(56, 56, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return ImageTextProcessor.from_folder(save_tiny_checkpoint(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """An image and a video on disk, in a folder whose name has to be encoded in an address."""
    desk = tmp_path_factory.mktemp("a desk%20 with ümlaut")
    IMAGE.save(desk / "image.png")
    (desk / "video").mkdir()
    for number, frame in enumerate(FRAMES):
        frame.save(desk / "video" / f"{number}.png")
    first, *others = (frame.copy() for frame in FRAMES)  # Pillow cannot write as TIFF what it has written as PNG
    first.save(desk / "video.tif", save_all=True, append_images=others)
    return desk


def encoded():
    stream = io.BytesIO()
    IMAGE.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def user(*parts):
    return [{"role": "user", "content": [*parts, TEXT]}]


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


IMAGES = {
    "PIL": lambda desk: {"type": "image", "image": IMAGE},
    "path": lambda desk: {"type": "image", "path": desk / "image.png"},
    "path as text": lambda desk: {"type": "image", "image": str(desk / "image.png")},
    "file address": lambda desk: {"type": "image", "url": (desk / "image.png").as_uri()},
    "file address of a path": lambda desk: {"type": "image", "path": (desk / "image.png").as_uri()},
    "data address": lambda desk: {"type": "image", "url": f"data:image/png;base64,{encoded()}"},
    "base64": lambda desk: {"type": "image", "base64": encoded()},
    "base64 as a data address": lambda desk: {"type": "image", "base64": f"data:image/png;base64,{encoded()}"},
    "base64 as an image": lambda desk: {"type": "image", "image": encoded()},
    "bytes": lambda desk: {"type": "image", "image": (desk / "image.png").read_bytes()},
    "OpenAI": lambda desk: {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{encoded()}", "detail": "low"},
    },
    "OpenAI, as text": lambda desk: {"type": "image_url", "image_url": (desk / "image.png").as_uri()},
    "array": lambda desk: {"type": "image", "image": np.asarray(IMAGE)},
    "array, channels first": lambda desk: {"type": "image", "image": np.asarray(IMAGE).transpose(2, 0, 1)},
    "tensor": lambda desk: {"type": "image", "image": torch.from_numpy(np.array(IMAGE))},
    "without a type": lambda desk: {"image": IMAGE},
    "beside empty keys": lambda desk: {"type": "image", "image": IMAGE, "url": None, "text": None},
    "RGBA": lambda desk: {"type": "image", "image": IMAGE.convert("RGBA")},
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(processor, desk, kind):
    messages = user(IMAGES[kind](desk))
    before = repr(messages)
    wanted = processor(
        text=processor.apply_chat_template(user({"type": "image"}), add_generation_prompt=True), images=IMAGE
    )
    assert same(processor.apply_chat_template(messages, **OPTIONS), wanted)
    assert repr(messages) == before, "what was given is not changed"


VIDEOS = {
    "frames": lambda desk: {"type": "video", "video": FRAMES},
    "paths of frames": lambda desk: {"type": "video", "video": [str(desk / "video" / f"{n}.png") for n in range(4)]},
    "addresses of frames": lambda desk: {
        "type": "video",
        "url": [(desk / "video" / f"{n}.png").as_uri() for n in range(4)],
    },
    "folder": lambda desk: {"type": "video", "path": desk / "video"},
    "folder as text": lambda desk: {"type": "video", "video": str(desk / "video")},
    "folder's address": lambda desk: {"type": "video", "url": (desk / "video").as_uri()},
    "file with several pages": lambda desk: {"type": "video", "video": desk / "video.tif"},
    "video_url": lambda desk: {"type": "video_url", "video_url": {"url": (desk / "video").as_uri()}},
    "array": lambda desk: {"type": "video", "video": np.stack([np.asarray(frame) for frame in FRAMES])},
    "tensor": lambda desk: {
        "type": "video",
        "video": torch.stack([torch.from_numpy(np.array(frame)).permute(2, 0, 1) for frame in FRAMES]),
    },
    "list of arrays": lambda desk: {"type": "video", "video": [np.asarray(frame) for frame in FRAMES]},
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_videos(processor, desk, kind):
    prompt = processor.apply_chat_template(user({"type": "video"}), add_generation_prompt=True)
    wanted = processor(text=prompt, videos=[FRAMES])
    assert wanted["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert same(processor.apply_chat_template(user(VIDEOS[kind](desk)), **OPTIONS), wanted)


def test_black_ink_on_a_transparent_ground(processor, tmp_path):
    layer = Image.new("RGBA", (224, 224), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (80, 80, 160, 160))
    layer.save(tmp_path / "ink.png")
    raw = {"processor_kwargs": {"do_rescale": False, "do_normalize": False}}
    for part in ({"type": "image", "path": tmp_path / "ink.png"}, {"type": "image", "image": layer}):
        inputs = processor.apply_chat_template(user(part), **OPTIONS, **raw)
        assert inputs["pixel_values"].unique().tolist() == [0, 255]
    inputs = processor.apply_chat_template(user({"type": "video", "video": [layer, layer]}), **OPTIONS, **raw)
    assert inputs["pixel_values_videos"].unique().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (
            {"type": "image", "url": "https://example.org/a.png"},
            ValueError,
            "^https://example.org/a.png is on the network",
        ),
        ({"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}, ValueError, "is on the network; download it"),
        ({"type": "video", "url": "https://example.org/a.mp4"}, ValueError, "is on the network; download it"),
        ({"type": "video", "video": ["https://a.b/1.png"]}, ValueError, "is on the network; download it"),
        ({"type": "image", "image": "gone.png"}, FileNotFoundError, "gone.png does not exist"),
        (
            {"type": "image", "image": IMAGE, "url": "a.png"},
            ValueError,
            "must have one of .*; got image=Image, url=a.png",
        ),
        ({"type": "image", "base64": "aaaa", "path": "a.png"}, ValueError, "got path=a.png, base64=aaaa"),
        ({"type": "video", "video": FRAMES, "path": "x"}, ValueError, "got video=list, path=x"),
        ({"type": "image"}, ValueError, "must have one of image, image_url, url, path, base64; got none of them"),
        (
            {"type": "video", "video": None},
            ValueError,
            "must have one of video, video_url, url, path; got none of them",
        ),
        ({"type": "audio", "audio": "a.wav"}, ValueError, 'a part of a message is audio; parts may be {"type": "text"'),
        ({"type": "input_image", "image_url": "a.png"}, ValueError, "a part of a message is input_image; parts may be"),
        ({"type": "text"}, TypeError, "a text part must have a text, got NoneType"),
        ({"role": "user"}, ValueError, "is none of these types; parts may be"),
        ("What?", TypeError, "must be a dict with a type, got str; see"),
        ({"type": "image", "image": 5}, TypeError, "the image of a message must be a PIL image, a path, .* got int"),
        ({"type": "image", "image": {"bytes": b""}}, TypeError, "got dict"),
        (
            {"type": "image_url", "image_url": {"address": "x"}},
            TypeError,
            "image_url must be an address or a dict .*got NoneType",
        ),
        ({"type": "image", "base64": "no base64!"}, ValueError, "no base64! is not base64"),
        ({"type": "image", "base64": "aGVsbG8gd29ybGQ="}, ValueError, "is not an image that Pillow can read"),
        ({"type": "image", "image": np.zeros((8, 8))}, ValueError, r"must be an array of .*got \(8, 8\)"),
        (
            {"type": "image", "image": np.zeros((8, 8, 3), np.uint16) + 256},
            ValueError,
            "array of uint16 from 256 to 256; scale",
        ),
        ({"type": "video", "video": []}, ValueError, "a video needs at least one frame"),
        ({"type": "video", "video": 5}, TypeError, "the video of a message must be a list of frames, .* got int"),
        ({"type": "video", "video": [FRAMES[0], IMAGE]}, ValueError, "of one size, got 56x56, 84x56"),
        ({"type": "image", "image": Image.new("RGB", (603, 3))}, ValueError, "the image of a message has 603x3 pixels"),
        (
            {"type": "image", "image": IMAGE, "max_pixels": 5},
            ValueError,
            "max_pixels of a single part .*processor_kwargs",
        ),
        ({"type": "video", "video": FRAMES, "fps": 2.0}, ValueError, "fps of a single part of type video"),
    ],
)
def test_parts_that_are_refused(processor, part, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(user(part), **OPTIONS)


def test_an_image_of_sides_that_no_model_takes_is_named(processor, tmp_path):
    Image.new("RGB", (603, 3)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match=r"strip\.png has 603x3 pixels, .* up to 200 to 1"):
        processor.apply_chat_template(user({"type": "image", "image": str(tmp_path / "strip.png")}), **OPTIONS)


@pytest.mark.parametrize(
    ("conversation", "error", "message"),
    [
        ([], ValueError, "the conversation is empty"),
        ([["hello"]], TypeError, "a message must be a dict with role and content, got str"),
        ([{"role": "user", "content": 5}], TypeError, "content must be a text or a list of parts, got int"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], TypeError, "a list of parts, got dict"),
        ([5], TypeError, "a conversation must be a list of messages, got int"),
    ],
)
def test_conversations_that_are_none(processor, conversation, error, message):
    with pytest.raises(error, match=message):
        processor.apply_chat_template(conversation, **OPTIONS)


def test_text_needs_no_images(processor):
    """What is only rendered may have parts without images, and nothing is read."""
    wanted = processor.apply_chat_template(user({"type": "image"}))
    assert wanted.count("<|image_pad|>") == 1
    for part in (
        {"type": "image", "url": "https://a.b/c.png"},
        {"type": "image_url", "image_url": {"url": "gone.png"}},
    ):
        assert processor.apply_chat_template(user(part)) == wanted
    with pytest.raises(ValueError, match="parts may be"):
        processor.apply_chat_template(user({"type": "audio"}))
    with pytest.raises(ValueError, match="must have one of"):
        processor.apply_chat_template(user({"type": "image", "image": IMAGE, "path": "a.png"}))


def test_content_of_text_alone_and_none():
    messages = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": "hi"}]
    assert read_conversations([messages], load=True) == [messages]


def test_order_through_a_batch(processor):
    conversations = [
        user({"type": "image", "image": IMAGE}, {"type": "video", "video": FRAMES}),
        [{"role": "user", "content": "only text"}],
        user({"type": "image", "image": noise(112, 56)}, {"type": "image", "image": noise(56, 112)}),
    ]
    inputs = processor.apply_chat_template(conversations, **OPTIONS, processor_kwargs={"padding": True})
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 6], [1, 4, 8], [1, 8, 4]]
    assert (inputs["mm_token_type_ids"] == 1).sum(-1).tolist() == [6, 0, 16]
    assert (inputs["mm_token_type_ids"] == 2).sum(-1).tolist() == [8, 0, 0]


def test_options_of_a_template(processor):
    messages = user({"type": "image", "image": noise(280, 280)})
    few = {"size": {"shortest_edge": 784, "longest_edge": 56 * 56}}
    wanted = processor.apply_chat_template(messages, **OPTIONS, processor_kwargs=few)
    assert wanted["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert same(processor.apply_chat_template(messages, **OPTIONS, **few), wanted), (
        "beside the template's, as in transformers"
    )
    with pytest.raises(TypeError, match=r"unknown option add_genration_prompt\. Did you mean add_generation_prompt\?"):
        processor.apply_chat_template(messages, add_genration_prompt=True)
    with pytest.raises(TypeError, match=r"unknown option paddings\. Did you mean padding\?"):
        processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"paddings": True})
    with pytest.raises(ValueError, match="size was given twice"):
        processor.apply_chat_template(messages, tokenize=True, processor_kwargs=few, **few)
    variable = processor.apply_chat_template(messages, "{{ messages | length }}{{ greeting }}", greeting="hello")
    assert variable == "1hello"


@pytest.mark.parametrize("kind", ["np", None])
def test_kinds_of_tensors(processor, kind):
    for options in ({"return_tensors": kind}, {"processor_kwargs": {"return_tensors": kind}}):
        inputs = processor.apply_chat_template(user({"type": "image", "image": IMAGE}), **OPTIONS, **options)
        assert isinstance(inputs["input_ids"], np.ndarray if kind else list)
    nested = {"processor_kwargs": {"text_kwargs": {"return_tensors": "np"}}}
    inputs = processor.apply_chat_template(user({"type": "image", "image": IMAGE}), **OPTIONS, **nested)
    assert isinstance(inputs["input_ids"], np.ndarray)


def test_named_templates(processor):
    several = copy.copy(processor)
    several.chat_template = {"default": processor.chat_template, "short": "{{ messages[0].role }}"}
    assert several.apply_chat_template(user(), "short") == "user"
    assert several.apply_chat_template(user()) == processor.apply_chat_template(user())


def test_a_mask_of_what_the_assistant_says(processor):
    template = "{% for m in messages %}{{ m.role }}\n{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    messages = [{"role": "assistant", "content": "hello"}]
    inputs = processor.apply_chat_template(messages, template, **OPTIONS, return_assistant_tokens_mask=True)
    assert processor.decode(inputs["input_ids"][0][inputs["assistant_masks"][0].bool()]) == "hello"
