"""Drawn tasks: pure functions of their seeds, in their sizes, with answers that score; splits that share nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsevlm.evaluation.metrics.scores import score
from sparsevlm.material import EVALUATION, FAMILIES, TRAINING, draw
from sparsevlm.material.charts import plot
from sparsevlm.material.documents import sheet
from sparsevlm.material.fonts import FONTS
from sparsevlm.material.photos import PHOTOS
from sparsevlm.material.screens import window
from sparsevlm.material.splits import generator, sizes
from sparsevlm.material.whole import GRIDS, _two_colours
from sparsevlm.material.words import _LISTS, filler, words

FIRST_SEED = {TRAINING: 1_000_000, EVALUATION: 0}
BRIEF = ("grounds", "grounds-faint", "documents", "charts", "screens", "whole", "chat")
TASKS = [(name, task) for name in BRIEF for task in FAMILIES[name].tasks if task not in FAMILIES[name].photographic]


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_an_example_follows_from_its_seed_has_its_size_and_answers_that_score(family, task):
    one, again = (draw(family, task, 3, EVALUATION, turns=50) for _ in range(2))
    assert [image.tobytes() for image in one.images] == [image.tobytes() for image in again.images]
    assert one.turns == again.turns
    assert (one.family, one.task) == (family, task)
    other = draw(family, task, FIRST_SEED[TRAINING], TRAINING, turns=50)
    assert one.images[0].tobytes() != other.images[0].tobytes()
    for example in (one, other):
        check_size(example)
        for turn in example.turns:
            check_turn(example, turn)


def check_size(example):
    (image,) = example.images
    assert image.mode == "RGB"
    is_scene = example.family.startswith("grounds") or (example.family, example.task) == ("chat", "scene")
    assert is_scene or image.width % 28 == image.height % 28 == 0
    is_document = "documents" in (example.family, f"{example.task}s")
    least, most = (512, 2048) if is_document else (144 if is_scene else 256, 1024)
    assert least <= image.width * image.height / 28**2 <= most


def check_turn(example, turn):
    assert score(turn.metric, turn.answers[0], turn.answers)["score"] == 1
    assert turn.question.strip()
    assert "{" not in turn.question
    assert turn.metric != "anls" or example.task in FAMILIES[example.family].read
    if turn.box is not None:
        left, top, right, bottom = turn.box
        assert 0 <= left < right <= example.images[0].width
        assert 0 <= top < bottom <= example.images[0].height


def test_several_questions_about_one_picture():
    one, several = draw("documents", "receipt", 5, EVALUATION), draw("documents", "receipt", 5, EVALUATION, turns=4)
    assert len(one.turns) == 1
    assert len({turn.question for turn in several.turns}) == 4
    assert one.images[0].tobytes() == several.images[0].tobytes()


def test_evaluation_has_words_fonts_sizes_and_photographs_of_its_own():
    tables = [FONTS, PHOTOS, sheet.GRIDS, plot.GRIDS, window.GRIDS, GRIDS, plot._FAMILIES]
    for table in tables:
        assert not set(table[TRAINING]) & set(table[EVALUATION])
        assert all(table.values())
    for kind in _LISTS:
        assert not set(words(kind, TRAINING)) & set(words(kind, EVALUATION))
        assert len(set(_LISTS[kind])) == len(_LISTS[kind]), "a word that is there twice may be in both"
    sentences = {split: set(filler(generator(split), split, 300)) for split in FIRST_SEED}
    assert not sentences[TRAINING] & sentences[EVALUATION]
    pairs = {split: {_two_colours(generator(split, i), split) for i in range(200)} for split in FIRST_SEED}
    assert not pairs[TRAINING] & pairs[EVALUATION]


def test_sizes_for_training_are_all_but_those_held_out():
    found = sizes(((4, 5),), range(2, 6), range(4, 6), range(8, 25))
    assert found == {EVALUATION: ((4, 5),), TRAINING: ((2, 4), (3, 4), (3, 5), (4, 4), (5, 4))}
    for table in (sheet.GRIDS, plot.GRIDS, window.GRIDS, GRIDS):
        assert len(table[TRAINING]) > 300


def test_one_seed_is_drawn_unlike_in_both_splits():
    shown = {split: draw("screens", "tab", seed, split).turns for split, seed in FIRST_SEED.items()}
    assert shown[TRAINING] != shown[EVALUATION]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("paintings", "oil", 1), "there is no family 'paintings'; there are grounds, "),
        (("charts", "radar", 1_000_000), "family charts has no task 'radar'; it has bars, lines, pie, groups."),
        (("charts", "bars", 1), r"seeds of training lie in \[1000000, \d+\), got 1."),
        (("charts", "bars", 1_000_000, EVALUATION), r"seeds of evaluation lie in \[0, 1000000\), got 1000000."),
        (("charts", "bars", 1, "test"), "there is no split 'test'; there are training, evaluation."),
        (("charts", "bars", 1_000_000, TRAINING, 0), "turns must be at least 1, got 0."),
    ],
)
def test_what_does_not_exist_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


def test_the_page_has_every_family_and_task():
    page = (Path(__file__).parents[2] / "docs" / "material.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(" `"): row.split("|")[2] for row in page.splitlines() if row.startswith("| `")}
    for name, family in FAMILIES.items():
        row = rows["grounds-<ground>" if name.startswith("grounds-") else name]
        assert [task.strip(" `") for task in row.split(",")] == list(family.tasks)


def test_grounds_have_scenes_of_their_own():
    """Else questions on eight grounds would be one question eight times, to an interval of a draw over rows."""
    for split, first in ((EVALUATION, 500_000), (TRAINING, 1_000_000)):
        asked = {
            ground: [draw("grounds", ground, seed, split).turns[0].answers for seed in range(first, first + 10)]
            for ground in ("noise", "gradient", "clutter", "faint")
        }
        assert len({str(answers) for answers in asked.values()}) == len(asked)
