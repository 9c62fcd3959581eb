"""Tasks that need photographs, with the packages that bring them."""

from __future__ import annotations

import numpy as np
import pytest

from sparsevlm.evaluation.suites.drawn import DrawnSuite
from sparsevlm.material import EVALUATION, FAMILIES, TRAINING, draw
from sparsevlm.material.photos import PHOTOS, check_photos, photo

pytest.importorskip("skimage", reason="photographs come in scikit-image")
pytest.importorskip("sklearn", reason="and in scikit-learn")

TASKS = [(name, task) for name, family in FAMILIES.items() for task in sorted(family.photographic)]


def test_every_photograph_is_there_and_in_one_split():
    for split in PHOTOS:
        check_photos(split)
    shown = {split: {photo(name).resize((64, 64)).tobytes() for name in names} for split, names in PHOTOS.items()}
    assert not shown[TRAINING] & shown[EVALUATION]
    assert sum(map(len, shown.values())) == sum(map(len, PHOTOS.values()))


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_an_example_follows_from_its_seed(family, task):
    one, again = (draw(family, task, 7, EVALUATION) for _ in range(2))
    assert one.images[0].tobytes() == again.images[0].tobytes()
    assert one.turns == again.turns
    assert draw(family, task, 1_000_007, TRAINING).images[0].tobytes() != one.images[0].tobytes()


def test_pictures_without_colour_have_none():
    seen = set()
    for seed in range(12):
        example = draw("whole", "photo", seed, EVALUATION, turns=9)
        pixels = np.asarray(example.images[0], np.int64)
        spread = (pixels.max(axis=2) - pixels.min(axis=2)).mean()
        (answer,) = (turn.answers[0] for turn in example.turns if "colour" in turn.question)
        assert answer == ("yes" if spread > 5 else "no")
        seen.add(answer)
    assert seen == {"yes", "no"}


def test_all_grounds_are_a_suite():
    suite = DrawnSuite("grounds")
    assert len(suite.fingerprint()) == 16
    assert [row.id for row in suite.rows("photograph", 2)] == ["500000", "500001"]
