"""Odd bodies, images and paths: the right status, a clear error, and a server that goes on."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import numpy as np
from live_server import QUESTION, about, asked, bytes_url, data_url, image_part, scene_url
from PIL import Image

from sparsevlm.scenes import draw_scene

SCENE = draw_scene(8).image


def with_image(url):
    return asked([image_part(url), {"type": "text", "text": QUESTION}])


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"n": 2}, "n", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "pass 0"),
        ({"presence_penalty": -1}, "presence_penalty", "pass 0"),
        ({"logprobs": True}, "logprobs", "pass false"),
        ({"n": True}, "n", "pass 1"),
        ({"logit_bias": {"1": 2}}, "logit_bias", "pass {}"),
        ({"response_format": {"type": "json_object"}}, "response_format", '"text"'),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"user": 3}, "user", "must be a text"),
        ({"temperature": 3}, "temperature", "less than or equal to 2, got 3"),
        ({"temperature": "0.5"}, "temperature", "got '0.5'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"max_tokens": 10**30}, "max_completion_tokens", "makes up to 1024"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "name one of them"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, None, "not empty"),
        ({"stop": [1]}, "stop.0", "string"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, None, "stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name", "not supported"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages.0.tool_calls", "not"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0", "'text'"),
        ({"messages": [{"role": "user", "content": "a <|image_pad|> b"}]}, "messages", "stands for an image"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": one} for one in ("<|image_", "pad|>")]}
                ]
            },
            "messages",
            "'<|image_pad|>', which stands for an image",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": "x " * 300_000}]}, "messages", "600000 characters"),
        ({"messages": [{"role": "user", "content": "x y " * 9000}]}, "messages", "takes up to 8192 tokens"),
        ({"messages": [{"role": "user", "content": "x"}] * 1001}, "messages", "at most 1000"),
        ({"sparsevlm": {"keep": 2.0}}, "sparsevlm", "in (0, 1]"),
        ({"sparsevlm": {"keep": 0}}, "sparsevlm", "at least 1"),
        ({"sparsevlm": {"keep": 0.01, "selector": "span"}}, "sparsevlm", "cannot hold"),
        ({"sparsevlm": {"keep": [0.5]}}, "sparsevlm", "must be a number"),
        ({"sparsevlm": {"keep": 10**400}}, "sparsevlm", "bits"),
        ({"sparsevlm": {"selector": "span2"}}, "sparsevlm", "there is no selector"),
        ({"sparsevlm": {"selector": {"a": 1}}}, "sparsevlm", "must be one of"),
        ({"sparsevlm": {"schedule": [1, 2]}}, "sparsevlm", "grows"),
        ({"sparsevlm": {"target_layers": [99]}}, "sparsevlm", "out of range"),
        ({"sparsevlm": {"target_layers": [{"a": []}]}}, "sparsevlm", "list of numbers"),
        ({"sparsevlm": {"engine": True}}, "sparsevlm", "unknown option engine"),
        ({"sparsevlm": {"image_cache": 1 << 60}}, "sparsevlm", "unknown option image_cache"),
        ({"sparsevlm": {"timeout": 0}}, "sparsevlm", "unknown option timeout"),
        ({"sparsevlm": {"tau": float(10**300)}}, "sparsevlm", "[0, 1]"),
        ({"sparsevlm": "fast"}, "sparsevlm", "dictionary"),
        ({"sparsevlm": {str(n): n for n in range(50_000)}}, "sparsevlm", "50000 options"),
        ({"sparsevlm": {"target_layers": [1] * 50_000}}, "sparsevlm", "50000 entries"),
        ({str(n): n for n in range(50_000)}, None, "keys is no part"),
        ({"messages": [{str(n): n for n in range(50_000)}]}, "messages.0", "keys is no part"),
        ({"messages": [{"role": "user", "content": [7] * 90_000}]}, "messages.0.content.0", "valid dictionary"),
    ],
)
def test_a_parameter_that_cannot_be_obeyed(live, change, param, says):
    status, error = live.post({**asked("x"), **change})
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert says in error["message"]


def test_a_long_name_of_a_parameter_does_not_come_back_whole(live):
    status, error = live.post({**asked("x"), "k" * 100_000: 1})
    assert (status, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "k" * 200


def test_what_asks_for_nothing_is_taken(live):
    neutral = {"n": 1, "frequency_penalty": 0.0, "logprobs": False, "tools": [], "user": "me", "store": None, "seed": 3}
    assert live.post({**asked(), **neutral})[0] == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN}', "holds NaN"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"messages": [' + b"[]," * 300_000 + b"[]]}", "more lists, objects and commas"),
        (b'{"messages": [' + b"1," * 600_000 + b"1]}", "more lists, objects and commas"),
        (b"{}", "model: Field required"),
        (json.dumps({**asked(), "metadata": json.loads("[" * 300 + "]" * 300)}).encode(), "metadata is not supported"),
    ],
    ids=range(13),
)
def test_a_body_that_is_no_request(live, body, says):
    status, error = live.post(body)
    assert status == 400
    assert says in error["message"]
    assert len(error["message"]) < 700


def test_other_types_methods_paths_and_models(live):
    body = json.dumps(asked())
    for kind in ("text/plain", "multipart/form-data", ""):
        assert live.post(body, **{"content-type": kind})[0] == 415
    assert live.post(body, **{"content-type": "application/json; charset=utf-8"})[0] == 200
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405), ("OPTIONS", "/v1/chat/completions", 405), ("POST", "/health", 405),
        ("GET", "/", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("POST", "/v1/completions", 404),
        ("POST", "/v1/chat/completions/", 404), ("GET", "/v1/models/other", 404), ("GET", "/%2e%2e/x", 404),
    ):  # fmt: skip
        found, _, said = live.send(method, path)
        assert (found, set(said["error"])) == (status, {"message", "type", "param", "code"}), path
    status, error = live.post({**asked(), "model": "gpt-4"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def png(width, height, rows=b"", depth=8, colour=2):
    """A PNG by its parts, which need not fit each other."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


WHOLE = saved(SCENE, "PNG")
BAD = {
    "huge": (bytes_url(png(100_000, 100_000)), "image_too_large", "pixels"),
    "a little too large": (bytes_url(png(8192, 4097)), "image_too_large", "8192x4097"),
    "none of its pixels": (bytes_url(png(500, 500)), "invalid_image", "damaged"),
    "no size": (bytes_url(png(0, 10)), "invalid_image", ""),
    "half": (bytes_url(WHOLE[: len(WHOLE) // 2]), "invalid_image", "damaged"),
    "a few bytes": (bytes_url(WHOLE[:20]), "invalid_image", "none that can be read"),
    "half a jpeg": (bytes_url(saved(SCENE, "JPEG")[:900]), "invalid_image", ""),
    "animated gif": (
        bytes_url(saved(SCENE, "GIF", save_all=True, append_images=[draw_scene(9).image])), "invalid_image", "animated"
    ),
    "animated webp": (
        bytes_url(saved(SCENE, "WEBP", save_all=True, append_images=[draw_scene(9).image])), "invalid_image", "animated"
    ),
    "animated png": (
        bytes_url(saved(SCENE, "PNG", save_all=True, append_images=[draw_scene(9).image])), "invalid_image", "animated"
    ),
    "one pixel wide": (data_url(Image.new("RGB", (1, 2000))), "invalid_image", "200 to 1"),
    "one pixel high": (data_url(Image.new("RGB", (2000, 1))), "invalid_image", "200 to 1"),
    "text": (bytes_url(b"hello, I am no image at all"), "invalid_image", "none that can be read"),
    "svg": (bytes_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "invalid_image", "none that can"),
    "tiff": (bytes_url(saved(SCENE, "TIFF"), "tiff"), "invalid_image", "PNG, JPEG, WebP and GIF"),
    "eps": (bytes_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "invalid_image", "none that can be read"),
    "empty": ("data:image/png;base64,", "invalid_image", "none that can be read"),
    "no base64": ("data:image/png;base64,@@@@", "invalid_image", "not base64"),
    "half of a surrogate pair": ("data:image/png,\ud800", "invalid_image", "none that can be read"),
    "not ascii": ("data:image/png;base64,ä", "invalid_image", "not ASCII"),
    "no comma": ("data:image/png;base64", None, "no comma"),
    "html": ("data:text/html;base64," + base64.b64encode(WHOLE).decode(), "invalid_image", "'text/html'"),
    "no type": ("data:;base64,AAAA", "invalid_image", "wanted is an image/ type"),
    "a file": ("file:///etc/passwd", "image_source_refused", "--image-root"),
    "a path": ("../../etc/passwd", "image_source_refused", "--image-root"),
    "the network": ("https://example.com/a.png", "image_source_refused", "--allow-remote-images"),
    "another scheme": ("ftp://example.com/a.png", "image_source_refused", "--image-root"),
    "nothing": ("", "image_source_refused", "--image-root"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_an_image_that_cannot_be_read(live, name):
    url, code, says = BAD[name]
    status, error = live.post(with_image(url))
    assert (status, error["code"]) == (400, code), error
    assert error["param"] == "messages.0.content.0.image_url"
    assert says in error["message"]
    assert len(error["message"]) < 300


def test_unusual_images_are_read(live):
    grey = np.asarray(SCENE.convert("L")).astype(np.uint16) * 257
    turned = Image.Exif()
    turned[0x0112] = 6
    for url in (
        data_url(SCENE.convert("CMYK"), "JPEG", quality=95),
        data_url(Image.fromarray(grey)),
        data_url(SCENE.convert("RGBA")),
        data_url(SCENE.convert("P")),
        data_url(SCENE.convert("1")),
        data_url(SCENE.convert("LA")),
        data_url(Image.new("RGB", (1, 1))),
        data_url(Image.new("RGB", (3, 400))),
        data_url(SCENE.rotate(90), "JPEG", exif=turned),
        scene_url(8).replace("image/png", "image/jpeg"),  # what is in it tells, not what it says
        scene_url(8).replace("data:image/png", "DATA:IMAGE/PNG"),
        scene_url(8).replace("+", "%2B"),
    ):
        status, answer = live.post(with_image(url))
        assert status == 200, answer
        assert answer["sparsevlm"]["visual_tokens"] > 0


def test_ten_thousand_images_are_refused_before_one_is_read(live):
    status, error = live.post(asked([image_part("data:image/png;base64,AAAA")] * 10_000))
    assert (status, error["code"]) == (400, "too_many_images")
    assert "10000 images" in error["message"]


def test_images_with_too_many_pixels_together(start):
    live = start(max_image_pixels=448 * 448, max_images=8)
    assert live.post(asked(about(8, 9, 10, 11)))[0] == 200
    status, error = live.post(asked(about(8, 9, 10, 11, 12)))
    assert (status, error["code"]) == (400, "image_too_large")
    assert "together" in error["message"]


def test_an_image_of_another_role(live):
    content = [image_part(scene_url(8))]
    status, error = live.post({**asked(), "messages": [{"role": "system", "content": content}]})
    assert status == 400
    assert "role user" in error["message"]
