"""Drawn tasks as suites of an evaluation."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from sparsevlm.evaluation import EvalConfig
from sparsevlm.evaluation.execution.generation import BatchGenerator
from sparsevlm.evaluation.suites.drawn import DrawnSuite
from sparsevlm.evaluation.suites.registry import is_drawn, open_suite
from sparsevlm.evaluation.suites.suite import Sample
from sparsevlm.material import FAMILIES, TRAINING, draw, fonts, photos


def config(suite, **options):
    return EvalConfig(suite, "bundled", **options)


def test_rows_are_of_consecutive_held_out_seeds():
    suite = open_suite(config("screens", first_seed=40))
    assert suite.tasks == FAMILIES["screens"].tasks
    rows = list(suite.rows("button", 3))
    assert [row.id for row in rows] == ["40", "41", "42"]
    assert suite.n_rows("button", None) == 500
    sample = rows[1].load()
    example = draw("screens", "button", 41, "evaluation")
    assert sample.images[0].tobytes() == example.images[0].tobytes()
    assert (sample.question, sample.answers, sample.metric) == (
        example.turns[0].question, example.turns[0].answers, "iou"
    )  # fmt: skip
    assert suite.fingerprint() == open_suite(config("screens", first_seed=40)).fingerprint()
    assert suite.fingerprint() != open_suite(config("screens", first_seed=41)).fingerprint()


def test_every_family_is_a_suite():
    assert all(is_drawn(name) for name in FAMILIES)
    assert not is_drawn("documents.jsonl")


def test_what_was_said_before_goes_along():
    sample = next(DrawnSuite("chat", wanted=("screen",)).rows("screen", 1)).load()
    turns = draw("chat", "screen", 500_000, "evaluation").turns
    assert len(sample.history) == len(turns) - 1 > 0
    assert sample.history[0] == (turns[0].question, turns[0].answers[0])
    assert sample.question == turns[-1].question


def test_a_prompt_with_a_history_has_the_images_first_and_the_instruction_in_every_turn():
    generator = object.__new__(BatchGenerator)
    generator.instruction = "Be brief."
    generator.processor = SimpleNamespace(chat_template="x", apply_chat_template=lambda messages, **options: messages)
    image = Image.new("RGB", (8, 8))
    prompt = generator._prompt(Sample((image,), "And its colour?", ("red",), "exact", (("What is it?", "a star"),)))
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
    first, answer, last = (message["content"] for message in prompt)
    assert first == [{"type": "image"}, {"type": "text", "text": "What is it?\nBe brief."}]
    assert answer == [{"type": "text", "text": "a star"}]
    assert last == [{"type": "text", "text": "And its colour?\nBe brief."}]


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("charts", {"tasks": ("radar",)}, "suite charts has no task 'radar'; it has bars, lines, pie, groups."),
        ("charts", {"first_seed": 1_000_000}, "pictures of seed 1000000 may have been trained on; the first row must"),
        ("chart", {}, "there is no suite 'chart'; give demo .or demo-<layout>., grounds, documents, charts, screens, "),
    ],
)
def test_what_does_not_exist_is_named(suite, options, message):
    with pytest.raises(ValueError, match=message):
        open_suite(config(suite, **options))


@pytest.fixture
def without(monkeypatch):
    """Hide packages from what looks for them."""
    find = importlib.util.find_spec

    def hide(*names):
        photos.photo.cache_clear()
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest)
        )

    yield hide
    photos.photo.cache_clear()


def test_missing_photographs_are_named_with_the_remedy_before_anything_runs(without):
    without("skimage", "sklearn")
    said = r"grounds needs photographs for photograph, collage: the photographs are those inside scikit-learn.*photos"
    with pytest.raises(ModuleNotFoundError, match=said) as caught:
        open_suite(config("grounds"))
    assert "--tasks noise,gradient,texture,clutter,crowded,faint" in str(caught.value)
    assert open_suite(config("grounds", tasks=("noise", "faint"))).fingerprint()
    with pytest.raises(ModuleNotFoundError, match="grounds-collage needs photographs"):
        open_suite(config("grounds-collage"))
    with pytest.raises(ModuleNotFoundError, match="the photographs are those inside scikit-image"):
        draw("grounds", "photograph", 1_000_000, TRAINING)


def test_a_package_without_its_photographs_is_named(monkeypatch, tmp_path):
    photos.photo.cache_clear()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(ModuleNotFoundError, match=r"this scikit-image does not hold the photograph moon\.png"):
        photos.photo("skimage/moon.png")
    photos.photo.cache_clear()


def test_missing_scores_are_named(without):
    without("anls_star")
    with pytest.raises(ModuleNotFoundError, match="pip install 'anls-star"):
        open_suite(config("documents"))
    assert open_suite(config("charts"))


@pytest.mark.parametrize(
    ("task", "message"),
    [("screens", "drawn documents, charts and screens need matplotlib"), ("charts", "drawn charts need")],
)
def test_without_matplotlib_the_extra_is_named(monkeypatch, task, message):
    fonts.font.cache_clear()
    fonts._folder.cache_clear()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=message):
        draw(task, FAMILIES[task].tasks[0], 1_000_000)
