"""Pictures, frames, checkpoints and a broken torchvision: what loads, and what is said where it does not."""

import json
import logging
import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from forks import run_forks
from sparsevlm.inputs import (
    ImageTextProcessor,
    as_rgb,
    decode_image,
    load_frames,
    load_image,
    load_model,
    load_processor,
    torchvision_works,
)
from tiny_checkpoint import save_tiny_checkpoint

BROKEN_TORCHVISION = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(tmp_path):
    return save_tiny_checkpoint(tmp_path / "copy")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a local path must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    image = load_image(tmp_path / "photo.jpg")
    assert (image.mode, image.size) == ("RGB", (20, 40))


def test_pictures_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_image(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="not an image"):
        load_image(tmp_path / "text.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_image(tmp_path / "half.png")


def grey(kind, factor=257):
    """A ramp of 256 grey levels, in a number of numpy's kind, and as 8-bit RGB."""
    ramp = np.arange(256).reshape(16, 16)
    return Image.fromarray((ramp * factor).astype(kind)), Image.fromarray(ramp.astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize(
    ("kind", "factor", "suffix"),
    [("<u2", 257, ".png"), ("<u2", 257, ".tif"), (">u2", 257, ".tif"), ("<i4", 257, ".tif"), ("<i4", 1, ".tif")],
)
def test_deep_greys_are_scaled(tmp_path, kind, factor, suffix):
    deep, expected = grey(kind, factor)
    file = tmp_path / f"deep{suffix}"
    deep.save(file)
    for image in (load_image(file), decode_image(file.read_bytes()), as_rgb(deep)):
        assert (image.mode, image.tobytes()) == ("RGB", expected.tobytes())


@pytest.mark.parametrize(("kind", "factor", "mode"), [("f4", 1 / 255, "F"), ("i4", 70000, "I"), ("i4", -1, "I")])
def test_pixels_without_a_known_white_are_refused(tmp_path, kind, factor, mode):
    file = tmp_path / "deep.tif"
    grey(kind, factor)[0].save(file)
    with pytest.raises(ValueError, match=rf"deep\.tif: pixels of mode {mode}, .*save the picture with 8 or 16 bits"):
        load_image(file)


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"bomb\.png has too many pixels .*; save it smaller"):
        load_image(tmp_path / "bomb.png")


def test_frames_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert [frame.getpixel((0, 0))[0] for frame in load_frames(tmp_path)] == [1, 2, 10]


def test_folders_that_are_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_frames(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no pictures"):
        load_frames(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load_frames(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="one size, got 8x8, 8x9"):
        load_frames(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"), ("qwen2_vl", "Qwen2VLForConditionalGeneration")],
)
def test_local_checkpoint_loads_with_its_class_and_no_network(tmp_path, no_network, family, name):
    folder = save_tiny_checkpoint(tmp_path, family)
    model = load_model(folder, dtype="bfloat16", device="cpu", attn_implementation="eager")
    assert type(model).__name__ == name
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert load_processor(str(folder)).tokenizer.padding_side == "left"


def test_unsupported_models(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(NotImplementedError, match=r"'llama'; supported are qwen2_vl, qwen2_5_vl"):
        load_model(copy)
    (copy / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no model_type"):
        load_model(copy)
    (copy / "config.json").write_text("not json")
    with pytest.raises(ValueError, match="not a JSON file"):
        load_model(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(copy)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a hub id"):
        load_model(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load_processor(tmp_path / "file")


def test_hub_id_that_is_not_in_the_cache(no_network):
    with pytest.raises(FileNotFoundError, match="nobody/nothing is no folder here"):
        load_model("nobody/nothing", local_files_only=True)


def test_weights_that_are_missing_damaged_or_pickled(copy):
    weights = copy / "model.safetensors"
    tensors = load_file(weights)
    first, *others = sorted(tensors)
    save_file({name: tensors[name] for name in others}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing"):
        load_model(copy)
    weights.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(copy)
    weights.unlink()
    torch.save({first: tensors[first]}, copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(copy)


def test_options_that_do_not_exist(folder):
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(folder, dtype="int8")
    with pytest.raises(ValueError, match="unknown device"):
        load_model(folder, device="toaster")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_a_gpu(folder):
    with pytest.raises(ValueError, match="finds no GPU"):
        load_model(folder, device="cuda")


def test_checkpoint_without_tokenizer(copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (copy / name).unlink()
    with pytest.raises(ValueError, match="no usable tokenizer and image processor"):
        load_processor(copy)


@pytest.mark.parametrize("error", ["RuntimeError('nms')", "OSError('libc10_cuda.so')", "ImportError('version')"])
def test_broken_torchvision_is_hidden(tmp_path, monkeypatch, caplog, error):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    with caplog.at_level(logging.INFO):
        assert not torchvision_works()
    assert "going on without it" in caplog.text
    assert not torchvision_works()
    with pytest.raises(ImportError):
        import torchvision  # noqa: F401
    del sys.modules["torchvision"]


FIRST = (
    "",
    "from transformers.utils import is_torchvision_available as seen; assert seen()\n",
    "from sparsevlm import apply_sparsevlm\n",
    "import sparsevlm.evaluation\n",
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, folder):
    """What whole processes with a broken torchvision say, by what they do first."""
    place = tmp_path_factory.mktemp("broken")
    package, info = place / "torchvision", place / "torchvision-0.28.0.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN_TORCHVISION)
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    code = (
        "import sys; from sparsevlm.inputs import load_model, load_processor\n"
        "print(type(load_processor(sys.argv[1])).__name__, type(load_model(sys.argv[1])).__name__)"
    )
    # What transformers imports of others; itself it looks for torchvision.
    imports = "import torch, torch._dynamo, torch.distributed.tensor, scipy.optimize"
    done = run_forks(imports, [first + code for first in FIRST], str(folder), path=place)
    return dict(zip(FIRST, done, strict=True))


@pytest.mark.parametrize("first", FIRST)
def test_a_whole_process_with_a_broken_torchvision(loaded, first):
    """transformers alone dies there: its vision models import any torchvision that is installed."""
    done = loaded[first]
    assert done.stdout.split() == ["ImageTextProcessor", "Qwen2_5_VLForConditionalGeneration"], done.stderr


def test_fallback_without_torchvision(folder):
    if torchvision_works():
        pytest.skip("torchvision works here")
    assert isinstance(load_processor(folder), ImageTextProcessor)
