"""The page in a real browser: headless Chromium, driven by playwright, on the bundled model."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import webbrowser
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.explore.answers import Answerer
from sparsevlm.explore.question import MAX_BYTES
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
IS_REQUIRED = os.environ.get("SPARSEVLM_BROWSER") == "required"  # in the session that is for these tests
SCENE = draw_scene(8)
SECONDS = 60_000  # milliseconds that anything on the page may take on a busy machine


def unless_missing(found, what):
    """Skip without what the page needs; in the session of these tests that is a failure."""
    if not found:
        (pytest.fail if IS_REQUIRED else pytest.skip)(f"no {what} here: nox -s explore")
    return found


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright import sync_api
    except ImportError:
        sync_api = None
    unless_missing(sync_api, "playwright")
    program = unless_missing(next(filter(None, map(shutil.which, BROWSERS)), None), "Chromium")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=list(FLAGS))  # its profile is a new folder
        yield started
        started.close()


@pytest.fixture(scope="module")
def answerer():
    torch.set_num_threads(1)
    model, processor = load_model(bundled_path(), dtype="float32", device="cpu"), load_processor(bundled_path())
    return Answerer(model, processor, apply_sparsevlm(model, processor=processor))


@pytest.fixture(scope="module")
def gradio():
    try:
        import gradio
    except ImportError:
        gradio = None
    return unless_missing(gradio, "gradio")


@pytest.fixture(scope="module")
def address(gradio, answerer):
    from sparsevlm.cli.run import NOT_MEANINGFUL
    from sparsevlm.explore.page import build_page
    from sparsevlm.explore.serve import start

    page = build_page(answerer, SCENE, NOT_MEANINGFUL)
    assert not page.analytics_enabled
    yield start(page)
    assert not page.share
    page.close()


class Tab:
    """One page as a user sees it."""

    def __init__(self, browser, address):
        self.context = browser.new_context(viewport={"width": 1280, "height": 1700})
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.hosts, self.problems = set(), []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("response", self.note_refused)
        self.page.on("console", self.note_policy)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def note_refused(self, response):
        """Note what the server does not give; gradio asks for the progress of small uploads when they are over."""
        if response.status >= 400 and "upload_progress" not in response.url:
            self.problems.append(f"{response.status} {response.url}")

    def note_policy(self, entry):
        """Note what the policy of the page keeps the browser from."""
        if "Content Security Policy" in entry.text:
            self.problems.append(entry.text)

    def text(self, name):
        return self.page.inner_text(f"#{name}")

    def answer(self, column):
        return self.page.input_value(f"#{column}-answer textarea")

    def counts(self, column="first"):
        """Kept, recycled and dropped patches that a column tells of, and the layer."""
        found = re.search(r"layer (\d+): (\d+) kept, (\d+) recycled, (\d+) dropped", self.text(f"{column}-counts"))
        return found and tuple(map(int, found.groups()))

    def kept(self, column="first"):
        """Kept patches, or -1 while none are told of."""
        counts = self.counts(column)
        return counts[1] if counts else -1

    def n_tokens(self, column="dense"):
        """New tokens that a column tells of."""
        found = re.search(r"(\d+) tokens", self.text(f"{column}-numbers"))
        return int(found.group(1)) if found else 0

    def wait(self, holds, what):
        """Wait until something is there and return it; say what the page says where it does not come."""
        end = time.monotonic() + SECONDS / 1000
        while not (found := holds()):
            if time.monotonic() > end:
                said = {name: self.text(name) for name in ("message", "dense-numbers", "first-numbers")}
                raise AssertionError(f"{what} did not come; the page says {said}")
            self.page.wait_for_timeout(50)
        return found

    def ask(self, question=None):
        if question is not None:
            self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def choose(self, menu, name):
        self.page.click(f"#{menu} input")
        self.page.get_by_role("option", name=name, exact=True).click()

    def upload(self, file):
        if (clear := self.page.locator("#file [aria-label='Clear']")).count():
            clear.first.click()
        self.page.locator("#file input[type=file]").set_input_files(file)

    def close(self):
        self.context.close()


@pytest.fixture
def open_tab(browser, address):
    tabs = []

    def opened():
        tabs.append(Tab(browser, address))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.close()
        assert tab.problems == []
        assert tab.hosts <= {urlsplit(address).netloc, ""}, "the page fetches from other hosts"


@pytest.fixture
def tab(open_tab):
    return open_tab()


@pytest.fixture
def endless(answerer):
    """The model says many tokens, one in a twentieth of a second; the value counts its passes."""
    model, n_passes = answerer._model, [0]
    ends = model.generation_config.eos_token_id

    def slow(*_):
        n_passes[0] += 1
        time.sleep(0.05)

    hook, model.generation_config.eos_token_id = model.register_forward_pre_hook(slow), None
    yield n_passes
    hook.remove()
    model.generation_config.eos_token_id = ends


def test_an_uploaded_picture_is_answered_and_the_budget_changes_what_is_kept(tab, tmp_path):
    scene = draw_scene(9)
    scene.image.save(tmp_path / "mine.png")
    question = scene.question("number")
    tab.upload(tmp_path / "mine.png")
    tab.page.wait_for_selector("#file :text('mine')")
    tab.ask(question.text)
    layer, kept, recycled, dropped = tab.wait(tab.counts, "the pruned answer")
    assert tab.answer("dense") == question.answer
    assert tab.answer("first") == question.answer
    assert layer == 23
    assert kept + recycled + dropped == 256
    assert kept == 64
    for column in ("dense", "first"):
        numbers = tab.text(f"{column}-numbers")
        assert "visual tokens in\t256" in numbers
        assert "plain: hooks on the model's own modules" in numbers
        assert re.search(r"KV cache\t[\d.]+ of 6\.73 MB", numbers)
        assert re.search(r"first token\t\d+ ms", numbers)
    dense = tab.text("dense-numbers")

    slider = tab.page.locator("#keep input[type=range]")
    box = slider.bounding_box()
    tab.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2, steps=5)
    tab.page.mouse.up()
    tab.wait(lambda: tab.kept() > kept + 20, "the larger budget")
    assert tab.text("dense-numbers") == dense  # it was not asked again
    by_mouse = tab.kept()
    slider.focus()
    for _ in range(15):
        slider.press("ArrowLeft")
    tab.wait(lambda: 0 < tab.kept() < by_mouse, "the smaller budget, by keys")
    tab.page.fill("#keep input[type=number]", "1")
    tab.page.press("#keep input[type=number]", "Enter")
    tab.wait(lambda: tab.kept() == 256, "the whole budget, typed")


def test_layers_and_the_rank_rule_and_a_second_selector(tab, request):
    tab.choose("other-selector", "sparsevlm")
    tab.ask()
    tab.wait(lambda: tab.counts("second") is not None, "the second selector's answer")
    assert tab.text("second").startswith("sparsevlm")
    assert "recycled: other dropped tokens merged into this one" in tab.text("legend")
    tab.page.fill("#layer input[type=number]", "6")
    tab.page.press("#layer input[type=number]", "Enter")
    tab.wait(lambda: (tab.counts() or (0,))[0] == 6, "the patches of another layer")
    tab.wait(lambda: (tab.counts("second") or (0, 0, 0))[2] > 0, "recycled patches")
    if target := request.config.getoption("--screenshot"):
        take_screenshot(tab, target)
    by_budget = tab.text("first-counts")
    tab.page.check("#adaptive input")
    tab.wait(lambda: tab.counts() and tab.text("first-counts") != by_budget, "the choice without a budget")
    tab.wait(lambda: tab.page.is_disabled("#keep input[type=range]"), "a slider that is off")
    assert tab.answer("first") == tab.answer("dense") == SCENE.question("number").answer
    tab.choose("selector", "divprune")
    tab.wait(lambda: "where no rank is known: set keep." in tab.text("first-numbers"), "the refusal")
    tab.wait(lambda: tab.counts("second") is not None, "the other selector's answer beside it")
    tab.choose("other-selector", "none")
    tab.page.wait_for_selector("#second", state="hidden")


def test_what_is_wrong_is_said_in_the_page(tab, tmp_path):
    (tmp_path / "notes.txt").write_text("words " * 40)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 40)
    (tmp_path / "large.png").write_bytes(b"x" * (MAX_BYTES + 1))
    tab.upload(tmp_path / "notes.txt")
    tab.wait(lambda: "it is a text file; give an image file." in tab.text("message"), "the message about a text")
    tab.upload(tmp_path / "broken.png")
    tab.wait(lambda: "broken.png is a damaged image" in tab.text("message"), "the message about a broken picture")
    tab.ask()
    tab.page.wait_for_timeout(500)
    assert "broken.png is a damaged image" in tab.text("message")
    assert tab.answer("dense") == ""
    tab.page.locator("#file [aria-label='Clear']").first.click()
    tab.wait(lambda: not tab.text("message"), "an empty message")
    tab.ask()
    tab.wait(lambda: "there is no picture: upload one." in tab.text("message"), "the message about no picture")
    tab.page.locator("#file input[type=file]").set_input_files(tmp_path / "large.png")
    tab.page.wait_for_selector(":text('exceed the maximum allowed size')")

    SCENE.image.save(tmp_path / "scene.png")
    tab.page.locator("#file input[type=file]").set_input_files(tmp_path / "scene.png")
    tab.page.wait_for_selector("#picture img")  # with it comes the picture's message, an empty one
    tab.ask("  ")
    tab.wait(lambda: "there is no question" in tab.text("message"), "the message about no question")
    tab.choose("selector", "span")
    tab.page.fill("#keep input[type=number]", "0.05")
    tab.ask(SCENE.question("number").text)
    tab.wait(lambda: "keep=0.05 cannot hold on target layers" in tab.text("first-numbers"), "the refused budget")
    assert tab.text("message") == ""
    assert tab.answer("dense") == SCENE.question("number").answer


def test_two_pages_at_once_get_their_own_answers(open_tab):
    one, other = open_tab(), open_tab()
    other.page.fill("#keep input[type=number]", "0.8")
    other.choose("selector", "grid")
    questions = [SCENE.question("number"), SCENE.question("word")]
    for tab, question in zip((one, other), questions, strict=True):
        tab.ask(question.text)
    for tab, question in zip((one, other), questions, strict=True):
        tab.wait(tab.counts, "an answer")
        assert tab.answer("dense") == question.answer
    assert one.answer("first") == questions[0].answer
    assert (one.text("first").split()[0], other.text("first").split()[0]) == ("span-features", "grid")
    one.wait(lambda: 0 < one.kept() <= 64, "few patches")
    other.wait(lambda: other.kept() > 64, "many patches")


def test_the_stop_button_ends_an_answer_where_it_is(tab, endless):
    tab.ask()
    tab.wait(lambda: tab.n_tokens() > 3, "the beginning of the answer")
    tab.page.click("#stop")
    tab.wait(lambda: "stopped" in tab.text("dense-numbers"), "the end")
    tab.wait(lambda: "stopped" in tab.text("first-numbers"), "the end of the other")
    passes = endless[0]
    tab.page.wait_for_timeout(500)
    assert endless[0] == passes


def test_a_tab_that_is_closed_ends_its_answer(open_tab, endless):
    tab = open_tab()
    tab.page.fill("#most input[type=number]", "512")
    tab.ask()
    tab.wait(lambda: tab.n_tokens() > 3, "the beginning of the answer")
    tab.page.close()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        passes = endless[0]
        time.sleep(1)
        if endless[0] == passes:
            break
    assert endless[0] == passes
    assert passes < 400


def test_the_command_serves_the_page_and_opens_it(gradio, monkeypatch):
    from sparsevlm.cli import app

    opened, served = [], threading.Event()
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: (served.set(), page.close()))
    result = CliRunner().invoke(app, ["explore", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert served.is_set()
    assert len(opened) == 1
    assert f"the page is at {opened[0]} (Ctrl-C ends it)" in result.output


def test_a_taken_port_is_said(address):
    from sparsevlm.cli import app

    port = str(urlsplit(address).port)
    result = CliRunner().invoke(app, ["explore", "--device", "cpu", "--no-browser", "--port", port])
    assert result.exit_code == 2
    assert f"the page cannot be served at 127.0.0.1, port {port}: taken" in " ".join(result.output.split())


def take_screenshot(tab, target):
    """Write the page as it is, in few colours."""
    tab.page.mouse.move(0, 0)
    tab.page.evaluate("document.activeElement.blur()")
    tab.page.screenshot(path=target, full_page=True)
    with Image.open(target) as image:
        image.convert("RGB").quantize(96, dither=Image.Dither.NONE).save(target, optimize=True)
