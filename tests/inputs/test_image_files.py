"""Image files of every kind: transparency, depth, several frames, and what is said of what is no image."""

import base64
import io
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sparsevlm.inputs import as_rgb, decode_image, load_frames, load_image
from sparsevlm.inputs.decoding import check_is_file
from sparsevlm.inputs.media import check_aspect_ratio
from sparsevlm.inputs.sources import resolve

SQUARE = (80, 80, 160, 160)


def ink(mode):
    """Black ink on a transparent ground of black, in one of the modes that can hold that."""
    layer = Image.new("RGBA", (224, 224), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), SQUARE)
    if mode in ("RGBA", "LA", "RGBa"):
        return layer.convert(mode)
    if mode == "PA":
        image = Image.new("P", (224, 224))
        image.putalpha(layer.getchannel("A"))
        assert image.mode == "PA"
        return image
    if mode == "La":
        return layer.convert("LA").convert("La")
    ground, kind, key = {
        "P with one index": (7, "P", 7),
        "P with alphas": (1, "P", bytes([255, 0])),
        "L": (9, "L", 9),
        "1": (255, "1", 255),
        "RGB": ((0, 0, 1), "RGB", (0, 0, 1)),
        "I;16": (1, "I;16", 1),
    }[mode]
    image = Image.new(kind, (224, 224), ground)
    if kind == "P":
        image.putpalette([0] * 768)
    image.paste(0 if kind != "RGB" else (0, 0, 0), SQUARE)
    image.info["transparency"] = key
    return image


def is_black_on_white(image):
    wanted = np.full((224, 224, 3), 255, np.uint8)
    wanted[80:160, 80:160] = 0
    return image.mode == "RGB" and np.array_equal(np.asarray(image), wanted)


MODES = ["RGBA", "LA", "PA", "RGBa", "La", "P with one index", "P with alphas", "L", "1", "RGB", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_black_ink_on_a_transparent_ground(mode):
    assert is_black_on_white(as_rgb(ink(mode)))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, ".png") for mode in ("RGBA", "LA", "P with one index", "P with alphas", "L", "1", "RGB", "I;16")],
        *[("RGBA", suffix) for suffix in (".webp", ".tif", ".tga", ".jp2", ".gif")],
        ("P with one index", ".gif"),
    ],
)
def test_transparent_files(tmp_path, mode, suffix):
    image, file = ink(mode), tmp_path / f"ink{suffix}"
    key = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(file, **key, **({"lossless": True} if suffix == ".webp" else {}))
    assert is_black_on_white(load_image(file))
    assert is_black_on_white(decode_image(file.read_bytes()))


def test_half_transparent_is_half_white():
    assert as_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_without_transparency(tmp_path, mode):
    image = (
        Image.new("RGB", (8, 8), "white").convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8), (255, 128, 128))
    )
    assert as_rgb(image).mode == "RGB"
    if mode not in ("HSV", "YCbCr"):
        image.save(tmp_path / "a.tif")
        assert min(load_image(tmp_path / "a.tif").getpixel((0, 0))) >= 250
    if mode == "CMYK":
        image.save(tmp_path / "a.jpg")
        assert min(load_image(tmp_path / "a.jpg").getpixel((0, 0))) >= 250


def deep(bits, top=None):
    """A ramp of all values of a depth in 16 bits."""
    top = (1 << bits) - 1 if top is None else top
    return Image.fromarray(np.linspace(0, top, 64 * 64).reshape(64, 64).round().astype(np.uint16))


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_fewer_bits_than_their_file(tmp_path, bits, suffix):
    file = tmp_path / f"deep{suffix}"
    deep(bits).save(file)
    with pytest.warns(
        UserWarning, match=rf"^sparsevlm: .*deep\{suffix} stores .* more than {bits}: {(1 << bits) - 1} is"
    ):
        image = load_image(file)
    values = np.asarray(image)[..., 0].astype(int).ravel()
    assert (values[0], values[-1]) == (0, 255)
    assert np.abs(values - np.linspace(0, 255, 64 * 64)).max() <= 1
    with pytest.warns(UserWarning, match="^sparsevlm: "):
        assert np.array_equal(np.asarray(decode_image(file.read_bytes())), np.asarray(image))
    with pytest.warns(UserWarning, match="^sparsevlm: the image "):
        assert np.array_equal(np.asarray(as_rgb(deep(bits))), np.asarray(image))


@pytest.mark.parametrize("top", [1 << 14, 65535])
def test_all_sixteen_bits(tmp_path, top):
    deep(16, top).save(tmp_path / "deep.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(tmp_path / "deep.png")
    assert image.getpixel((63, 63))[0] == round(top / 257)


def test_a_black_image_is_black_without_a_word(tmp_path):
    deep(16, 0).save(tmp_path / "black.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "black.png").getextrema() == ((0, 0),) * 3


def test_frames_share_their_depth(tmp_path):
    for number, top in enumerate((4095, 200, 900)):
        deep(16, top).save(tmp_path / f"{number}.png")
    with pytest.warns(UserWarning, match="more than 12") as caught:
        frames = load_frames(tmp_path)
    assert len(caught) == 1, "one for the video, not one for each frame"
    assert [frame.getpixel((63, 63))[0] for frame in frames] == [255, round(200 / 4095 * 255), round(900 / 4095 * 255)]


def colours_in_16_bits(bits):
    """A PNG of 16 bits for each of red, green and blue, which Pillow cannot write."""
    ramp = np.linspace(0, (1 << bits) - 1, 32 * 32).reshape(32, 32, 1).repeat(3, axis=2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in ramp)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_dark_colours_in_16_bits_are_said(tmp_path):
    (tmp_path / "dark.png").write_bytes(colours_in_16_bits(12))
    with pytest.warns(UserWarning, match=r"^sparsevlm: .*dark\.png stores colours in 16 bits, .*such as 12, save"):
        load_image(tmp_path / "dark.png")
    (tmp_path / "full.png").write_bytes(colours_in_16_bits(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "full.png").getpixel((31, 31)) == (255, 255, 255)


SEVERAL = [".gif", ".webp", ".png", ".tif"]


def save_frames(file, n_frames=4, size=(64, 48)):
    frames = [Image.new("RGB", size, (40 * number, 0, 0)) for number in range(n_frames)]
    lossless = {"lossless": True} if file.suffix == ".webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], **lossless)
    return file


@pytest.mark.parametrize("suffix", SEVERAL)
def test_files_with_several_frames(tmp_path, suffix):
    file = save_frames(tmp_path / f"several{suffix}")
    with pytest.warns(
        UserWarning, match=rf"^sparsevlm: .*several\{suffix} has 4 frames or pages, and the first is read"
    ):
        assert load_image(file).getpixel((0, 0)) == (0, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [load_image(file, frame=number).getpixel((0, 0))[0] for number in range(4)] == [0, 40, 80, 120]
        for source in (file, str(file), file.as_uri()):
            assert [frame.getpixel((0, 0))[0] for frame in load_frames(source)] == [0, 40, 80, 120]
    for number in (4, -1):
        with pytest.raises(
            ValueError, match=f"several{suffix} has 4 frames, numbered from 0; there is no frame {number}"
        ):
            load_image(file, frame=number)


def test_a_file_with_one_frame(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / "one.png")
        load_image(tmp_path / "one.png", frame=0)
    with pytest.raises(ValueError, match="has one frame, number 0; there is no frame 1"):
        load_image(tmp_path / "one.png", frame=1)
    with pytest.raises(FileNotFoundError, match=r"is a file with one image; give a folder .*, or an animated GIF"):
        load_frames(tmp_path / "one.png")


def test_thumbnails_and_previews_are_no_frames(tmp_path):
    frames = [Image.new("RGB", (64, 48), "red"), Image.new("RGB", (16, 12), "blue")]
    frames[0].save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "camera.jpg").size == (64, 48)
    assert load_image(tmp_path / "camera.jpg", frame=1).size == (16, 12)
    with pytest.raises(FileNotFoundError, match="a file with one image"):
        load_frames(tmp_path / "camera.jpg")


def test_pages_of_several_sizes_are_no_video(tmp_path):
    pages = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="one size, got 8x8, 8x9"):
        load_frames(tmp_path / "pages.tif")


def test_hidden_files_in_a_folder_of_frames(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "._x.png").write_bytes(b"\x00\x05\x16\x07" + b"\x00" * 40)
    Image.new("RGB", (9, 9)).save(tmp_path / ".thumbnail.png")
    assert len(load_frames(tmp_path)) == 1
    (tmp_path / "x.png").unlink()
    with pytest.raises(ValueError, match="holds no pictures"):
        load_frames(tmp_path)


def test_names_of_frames_with_digits_of_other_scripts(tmp_path):
    for name in ("a²", "a10", "a٣", "a2"):  # superscript two is no decimal digit, Arabic three is
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    assert len(load_frames(tmp_path)) == 4


ISO = b"\x00\x00\x00\x20ftyp%s\x00\x00\x02\x00mp41" + b"\x00" * 64
NOT_IMAGES = [
    (b"", "it is empty"),
    (b"hello there\n", "it is a text file; give an image file"),
    ("grüße ".encode() * 800, "it is a text file"),
    (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "it is a PDF document; save the page as PNG"),
    (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", "it is an SVG drawing; save it as PNG"),
    (b"<!DOCTYPE html><html></html>", "it is a web page; download the image itself"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer; .*git lfs pull"),
    (ISO % b"heic", "it is a HEIC image; save it as JPEG or PNG, or install pillow-heif"),
    (ISO % b"mif1", "it is a HEIC image"),
    (ISO % b"isom", r"it is a video; extract its frames .*ffmpeg"),
    (b"\x1aE\xdf\xa3" + b"\x00" * 64, "it is a video"),
    (b"RIFF\x00\x00\x00\x00AVI LIST", "it is a video"),
    (b"\xff\x0a" + b"\x00" * 64, "it is a JPEG XL image; save it as JPEG or PNG"),
    (b"\x00\x05\x16\x07" + b"\x00" * 64, r"it is metadata that macOS keeps .*; give the file without \._ before"),
    (b"\x01\x02\x03\x00" * 16, r"(?<=can read)\.$"),
]


@pytest.mark.parametrize(("content", "message"), NOT_IMAGES, ids=[message for _, message in NOT_IMAGES])
def test_files_that_are_no_images(tmp_path, content, message):
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file\.png is not an image that Pillow can read.*{message}"):
        load_image(tmp_path / "file.png")
    with pytest.raises(ValueError, match=message):
        decode_image(content)


def test_avif_that_pillow_was_built_without(tmp_path, monkeypatch):
    (tmp_path / "a.avif").write_bytes(ISO % b"avif")
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "AVIF"])
    with pytest.raises(ValueError, match=r"it is an AVIF image; save it as PNG, or install Pillow 11\.3"):
        load_image(tmp_path / "a.avif")


def test_drawings_are_no_damaged_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with pytest.raises(ValueError, match=r"a\.eps is an EPS drawing, which is not decoded here; save it as PNG"):
        load_image(tmp_path / "a.eps")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "ring.png").symlink_to(tmp_path / "ring.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        for name, message in (
            ("pipe.png", r"pipe\.png is a named pipe, not a picture; .* into a file first"),
            ("link.png", r"link\.png is a symbolic link to .*gone\.png, which does not exist"),
            ("ring.png", "is a symbolic link to .*, which does not exist"),
            ("s.png", "is a socket, not a picture"),
            ("/dev/null", "/dev/null is a device, not a picture"),
            ("a" * 300 + ".png", r"a\.png does not exist"),
            ("nul\0.png", "does not exist"),
            (".", "is a folder, not a picture; give an image file"),
        ):
            with pytest.raises(FileNotFoundError, match=message):
                load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is a named pipe, not a video; give a folder"):
        load_frames(tmp_path / "pipe.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    with pytest.raises(PermissionError, match=r"locked\.png cannot be read: permission denied; check its rights"):
        load_image(tmp_path / "locked.png")


def test_permission_errors_of_the_system_are_named(tmp_path, monkeypatch):
    """As for another user than root, who may read everything."""
    Image.new("RGB", (8, 8)).save(tmp_path / "locked.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        with pytest.raises(PermissionError, match=r"locked\.png cannot be read: permission denied; check its rights"):
            load_image(tmp_path / "locked.png")
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "stat", refuse)
        with pytest.raises(PermissionError, match=r"a\.png cannot be read: .* the rights of its folder"):
            check_is_file(tmp_path / "a.png", "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "iterdir", refuse)
        with pytest.raises(PermissionError, match=r"video folder .* cannot be read: permission denied"):
            load_frames(tmp_path)


def test_a_warning_turned_into_an_error_is_no_damage(tmp_path):
    file = save_frames(tmp_path / "a.gif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="has 4 frames"):
            load_image(file)


@pytest.mark.filterwarnings("ignore")
def test_damage_of_any_kind_is_a_value_error():
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "TIFF")
    rng = np.random.default_rng(1)
    refused = set()
    for _ in range(600):
        content = bytearray(stream.getvalue())
        content[rng.integers(4, 200)] = rng.integers(256)
        try:
            assert decode_image(bytes(content)).mode == "RGB"
        except ValueError as error:
            refused.add(str(error)[:38])
    assert "what its bytes hold is a damaged image" in refused
    assert all(message.startswith("what its bytes hold") for message in refused)


@pytest.mark.parametrize(
    "error", [struct.error, KeyError, NotImplementedError, TypeError, EOFError, OSError, SyntaxError]
)
def test_errors_of_any_decoder_are_named(tmp_path, monkeypatch, error):
    """Pillow's plugins raise all of these somewhere; that of DDS NotImplementedError, for example."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(_):
        raise error("odd")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    with pytest.raises(ValueError, match=r"a\.png is a damaged image: .*odd"):
        load_image(tmp_path / "a.png")


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def test_what_names_an_image(tmp_path):
    image = Image.new("RGB", (8, 6), (10, 20, 30))
    odd = tmp_path / "a b%20c#ü.png"
    image.save(odd)
    text = encoded(image)
    urlsafe = text.replace("+", "-").replace("/", "_").rstrip("=")
    for source in (
        odd,
        str(odd),
        odd.as_uri(),
        f"file://localhost{odd.as_uri().removeprefix('file://')}",
        f"data:image/png;base64,{text}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('=', '%3D')}",
        f"data:;base64,{urlsafe}",
        text,
        "\n".join(text[start : start + 60] for start in range(0, len(text), 60)),
    ):
        assert load_image(source).tobytes() == image.tobytes(), source


@pytest.mark.parametrize(
    ("source", "message"),
    [
        *[
            (source, f"^{source} is on the network; download it and give its path: only local files are read")
            for source in (
                "https://example.org/a.png",
                "http://a.b/c",
                "ftp://a.b/c",
                "s3://bucket/key",
                "HTTPS://A.B/c",
            )
        ],
        ("file://server/share/a.png", "is on the host server; give a file of this machine"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,a!b", "is not base64"),
    ],
)
def test_what_names_no_local_image(source, message):
    with pytest.raises(ValueError, match=message):
        resolve(source)


def test_an_address_in_a_path_is_still_one():
    with pytest.raises(ValueError, match="is on the network"):
        load_image(Path("https://example.org/a.png"))
    long = "folder/" * 20 + "frames"
    with pytest.raises(
        FileNotFoundError, match=f"{long} does not exist; check the path, which starts at .*, or give a"
    ):
        load_frames(long)
    with pytest.raises(FileNotFoundError, match=r"/no/photo\.jpg does not exist; check the path, or give an image"):
        load_image("/no/photo.jpg")


def test_sides_that_no_model_takes():
    check_aspect_ratio((600, 3), "a")
    for size in ((601, 3), (3, 601)):
        with pytest.raises(
            ValueError, match=rf"^strip\.png has {size[0]}x{size[1]} pixels, .* up to 200 to 1; crop it"
        ):
            check_aspect_ratio(size, "strip.png")
