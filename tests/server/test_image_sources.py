"""Files and addresses of images: what may be read, and that nothing else is."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from live_server import QUESTION, asked, image_part

from sparsevlm.scenes import draw_scene
from sparsevlm.server import ServerSettings
from sparsevlm.server.errors import RequestError
from sparsevlm.server.images import ImageReader
from sparsevlm.server.remote import RemoteImages, is_public, resolve


def reader(remote=None, **settings):
    settings = ServerSettings("m", **settings)
    return ImageReader(settings, remote or RemoteImages(settings))


def read(images, url):
    (image,) = images.read([(url, "here")], time.monotonic() + 10)
    return image.size


def refusal(images, url):
    with pytest.raises(RequestError) as caught:
        read(images, url)
    assert caught.value.param == "here"
    return caught.value


@pytest.fixture
def folder(tmp_path):
    """A root with a scene, and one beside it that links and dots must not reach."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for one in (root / "more", outside):
        one.mkdir(parents=True)
        draw_scene(8).image.save(one / "a b.png")
    draw_scene(8).image.save(root / "scene.png")
    (root / "link.png").symlink_to(outside / "a b.png")
    (root / "folder").symlink_to(outside)
    (root / "inner.png").symlink_to(root / "scene.png")
    (root / "text.txt").write_text("secret")
    os.mkfifo(root / "pipe")
    return root


def test_files_under_the_root(folder):
    images = reader(image_root=folder)
    good = ("scene.png", "./more/../scene.png", "more/a b.png", "inner.png", f"{folder}/scene.png")
    for url in (*good, f"file://{folder}/more/a%20b.png", f"file://localhost{folder}/scene.png"):
        assert read(images, url) == (448, 448)


def test_files_elsewhere_are_refused_alike(folder):
    images = reader(image_root=folder)
    said = set()
    for url in (
        "../outside/a b.png", "link.png", "folder/a b.png", "/etc/passwd", "file:///etc/passwd", "gone.png", "pipe",
        f"file://{folder}/%2e%2e/outside/a%20b.png", f"file://other{folder}/scene.png", "more", "", "a\0b", "x" * 5000,
        "file:///proc/self/environ", f"{folder}-sibling/x.png", "file:///dev/zero", "file://[/x", "ftp://host/a.png",
    ):  # fmt: skip
        error = refusal(images, url)
        said.add((str(error), error.status, error.code))
    assert len(said) == 1  # what there is outside is not told
    assert "secret" not in str(refusal(images, "text.txt"))
    link_as_root = folder.parent / "link"
    link_as_root.symlink_to(folder)
    assert read(reader(image_root=link_as_root), "scene.png") == (448, 448)


def test_a_file_with_too_many_bytes(folder):
    error = refusal(reader(image_root=folder, max_image_bytes=100), "scene.png")
    assert (error.status, error.code) == (413, "image_too_large")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0",
        "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "::127.0.0.1", "2002:7f00:1::", "2002:a9fe:a9fe::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:db8::1",
        "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(address)
    remote = RemoteImages(ServerSettings("m", allow_remote_images=True), lambda host, port: [(2, address, port)])
    error = refusal(reader(remote), "http://images.example/a.png")
    assert error.code == "image_source_refused"


def test_addresses_that_are_public():
    for address in (
        "8.8.8.8",
        "1.1.1.1",
        "2606:4700:4700::1111",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::",
    ):
        assert is_public(address)


def test_one_private_address_of_several_is_enough():
    both = [(2, "8.8.8.8", 80), (2, "127.0.0.1", 80)]
    remote = RemoteImages(ServerSettings("m", allow_remote_images=True), lambda host, port: both)
    assert refusal(reader(remote), "http://images.example/a.png").code == "image_source_refused"


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png", "http://localhost/a.png", "http://2130706433/a.png", "http://0x7f.1/a.png",
        "http://0177.0.0.1/", "http://[::1]/a.png", "http://[::ffff:127.0.0.1]/a.png", "http://127.0.0.1.:80/",
        "http://user:word@8.8.8.8/a.png", "http:///a.png", "HTTP://LOCALHOST/", "https://0/", "http://127.1/",
    ],
)  # fmt: skip
def test_odd_names_of_this_machine(url):
    images = reader(allow_remote_images=True)
    assert refusal(images, url).code in ("image_source_refused", "image_fetch_failed")


class Pages(http.server.BaseHTTPRequestHandler):
    """A web server of odd pages."""

    asked: list[str] = []  # noqa: RUF012
    scene = b""

    def do_GET(self):
        self.asked.append(self.path)
        page, _, argument = self.path[1:].partition("/")
        if page == "to":
            self.send_response(302)
            self.send_header("location", argument)
            self.end_headers()
            return
        if page == "slow":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
            return
        self.send_response(404 if page == "gone" else 200)
        if page == "zipped":
            self.send_header("content-encoding", "gzip")
        self.send_header("content-length", str(len(self.scene) + 50 * (page == "short")))
        self.end_headers()
        self.wfile.write(self.scene)

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    """Its port, what reads images from it alone, and what it was asked."""
    draw_scene(8).image.save(tmp_path / "scene.png")
    Pages.scene, Pages.asked = (tmp_path / "scene.png").read_bytes(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port

    def resolved(host, to):
        addresses = {"images.example": "127.0.0.1", "inner.example": "10.0.0.1", "own.example": "127.0.0.2"}
        return [(socket.AF_INET, addresses[host], to)] if host in addresses else resolve(host, to)

    settings = ServerSettings("m", allow_remote_images=True, max_image_bytes=1 << 20)
    remote = RemoteImages(settings, resolved, lambda address: address == "127.0.0.1")
    yield f"http://images.example:{port}", ImageReader(settings, remote), Pages.asked
    server.shutdown()
    server.server_close()


def test_an_image_of_the_network(web):
    base, images, asked_of_it = web
    assert read(images, f"{base}/scene?a=b#c") == (448, 448)
    assert asked_of_it == ["/scene?a=b"]
    assert read(images, f"{base}/to//scene") == (448, 448)
    assert read(images, f"{base}/to/{base}/to//scene") == (448, 448)


def test_every_redirect_is_checked(web):
    base, images, asked_of_it = web
    for to in ("http://inner.example/", "http://own.example:1/", "http://169.254.169.254/latest", "http://[::1]/"):
        asked_of_it.clear()
        assert refusal(images, f"{base}/to/{to}").code == "image_source_refused"
        assert len(asked_of_it) == 1
    for to in ("file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://images.example/"):
        assert refusal(images, f"{base}/to/{to}").code == "image_source_refused"
    assert refusal(images, f"{base}/to/http://[").code == "image_fetch_failed"
    assert "redirects" in str(refusal(images, f"{base}/to//to//to//to//scene"))


def test_pages_that_are_no_images(web):
    base, images, _ = web
    for page in ("gone", "zipped", "short"):
        assert refusal(images, f"{base}/{page}").code == "image_fetch_failed"
    Pages.scene = bytes(1 << 21)
    assert refusal(images, f"{base}/scene").status == 413
    Pages.scene = b"<html>"
    assert refusal(images, f"{base}/scene").code == "invalid_image"
    assert refusal(images, "http://images.example:1/").code == "image_fetch_failed"
    assert refusal(images, f"{base}/\ud800").code == "image_fetch_failed"
    assert refusal(images, "http://images.example:99999/").code == "image_fetch_failed"


def test_what_comes_byte_by_byte_ends_in_time(web):
    base, images, _ = web
    begin = time.monotonic()
    with pytest.raises(RequestError) as caught:
        images.read([(f"{base}/slow", "here")], begin + 1)
    assert caught.value.code == "image_fetch_failed"
    assert time.monotonic() - begin < 4


def test_a_server_that_reads_files(start, folder):
    live = start(image_root=folder)
    status, answer = live.post(asked([image_part("scene.png"), {"type": "text", "text": QUESTION}]))
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "354")
    assert live.post(asked([image_part("link.png")]))[0] == 400
