"""Answers, read off the pictures or off each other."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from sparsevlm.material import EVALUATION, draw
from sparsevlm.material.charts.plot import COLOURS
from sparsevlm.material.grounds import GROUNDS, PHOTOGRAPHIC, scene_seed
from sparsevlm.material.screens import in_units
from sparsevlm.scenes import COLOUR_RGB, draw_scene
from sparsevlm.scenes import COLOURS as SCENE_COLOURS

MANY = 500
SEEDS = range(20, 23)
SUFFIX = re.compile(r" (Answer|Please).*$")


def asked(family, task, seed):
    """The picture, and answers by question without what says how to answer."""
    example = draw(family, task, seed, EVALUATION, turns=MANY)
    return np.asarray(example.images[0], np.int64), {SUFFIX.sub("", turn.question): turn for turn in example.turns}


def answers(turns, pattern):
    """Answers to the questions that a pattern fits, by what its group holds."""
    found = {text: re.search(pattern, text) for text in turns}
    return {match[1]: turns[text].answers[0] for text, match in found.items() if match}


def rgb(name):
    return np.array([int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)])


def shows(pixels, colour):
    return (np.abs(pixels - colour) <= 2).all(axis=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_receipt_adds_up(seed):
    _, turns = asked("documents", "receipt", seed)
    prices = answers(turns, r"(?:What does|How much is|paid for|price of) (?!the tax)(.*?)(?: cost)?[?.]$")
    cents = {item: round(100 * float(price)) for item, price in prices.items() if "tax" not in item}
    (tax,) = (turn.answers[0] for text, turn in turns.items() if "tax" in text)
    (total,) = (turn.answers[0] for text, turn in turns.items() if "total" in text.lower() or "in all" in text)
    assert round(100 * float(tax)) == round(0.07 * sum(cents.values()))
    assert round(100 * float(total)) == sum(cents.values()) + round(0.07 * sum(cents.values()))
    (dearest,) = (
        turn for text, turn in turns.items() if "expensive" in text or "costs most" in text or "dearest" in text
    )
    assert dearest.answers[0].lower() == max(cents, key=cents.__getitem__)
    assert dearest.follow.answers[0] == prices[dearest.answers[0].lower()]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_largest_of_a_column_is_its_largest(seed):
    _, turns = asked("documents", "table", seed)
    cells = {}
    for text, turn in turns.items():
        for pattern in (r"for (.+) in (\w+)\?", r"row (.+) and the column (\w+)\?"):
            if match := re.search(pattern, text):
                cells.setdefault(match[2], {})[match[1]] = int(turn.answers[0])
        if match := re.search(r"Read the (\w+) entry of (.+)\.", text):
            cells.setdefault(match[1], {})[match[2]] = int(turn.answers[0])
    most = answers(turns, r"(?:largest value in|^In|leads in) (\w+)(?:\?|, which row is highest)")
    assert most
    for column, row in most.items():
        assert row == max(cells[column], key=cells[column].__getitem__)


def test_filled_boxes_of_a_form_are_ticked():
    seen = set()
    for seed in SEEDS:
        pixels, turns = asked("documents", "form", seed)
        for turn in turns.values():
            if turn.metric != "exact":
                continue
            left, top, right, bottom = turn.box
            inner = pixels[top + 3 : bottom - 3, left + 3 : right - 3].mean(axis=2)
            is_dark = (inner < 128).mean() > 0.05
            assert turn.answers[0] == ("yes" if is_dark else "no")
            seen.add(turn.answers[0])
    assert seen == {"yes", "no"}


def test_bars_are_as_long_as_their_values():
    checked = 0
    for seed in range(20, 26):
        pixels, turns = asked("charts", "bars", seed)
        (colour,) = (turn.answers[0] for text, turn in turns.items() if "olour" in text)
        values = sorted(int(turn.answers[0]) for turn in turns.values() if turn.metric == "relaxed")
        if colour == "black":  # as the letters
            continue
        inked = shows(pixels, rgb(colour))
        # Along one side the bars stand apart, along the other they reach to unlike lengths.
        lengths = [sorted(int(run.max()) for run in runs(inked.sum(axis=axis))) for axis in (0, 1)]
        found = next(one for one in lengths if len(one) == len(values))
        assert np.allclose(np.array(found) / found[-1], np.array(values) / values[-1], atol=0.02)
        checked += 1
    assert checked > 3


def runs(counts):
    """Pieces of a row of counts between zeros, without specks."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], counts > 0, [0]])))
    return [counts[begin:end] for begin, end in edges.reshape(-1, 2) if end - begin > 6]


def test_slices_cover_their_shares():
    checked = 0
    for seed in range(20, 26):
        pixels, turns = asked("charts", "pie", seed)
        shares = answers(turns, r"(?:share does|percent is) (.+?)(?: have, in percent)?\?$")
        if not shares or len(set(shares)) < 3:
            continue
        colours = answers(turns, r"(?:What colour is|slice of) (.+)\?$")
        areas = {name: shows(pixels, rgb(colours[name])).sum() for name in shares}
        for name, share in shares.items():
            assert areas[name] / sum(areas.values()) == pytest.approx(int(share) / 100, abs=0.04)
        checked += 1
    assert checked > 1


@pytest.mark.parametrize("task", ["lines", "groups"])
def test_peaks_are_where_the_values_are_largest(task):
    for seed in SEEDS:
        _, turns = asked("charts", task, seed)
        values = {}
        for text, turn in turns.items():
            if turn.metric == "relaxed":
                name, place = re.search(
                    r"(?:What is|value of|value does|How much is) (.+?)(?: have)? in (\w+)\?", text
                ).groups()
                values.setdefault(name.removeprefix("the value of "), {})[place] = int(turn.answers[0])
        peaks = answers(turns, r"(?:year|group) is (.+) highest\?") | answers(
            turns, r"When (?:does|is) (.+) (?:peak|at its largest)"
        )
        assert set(peaks) == set(values)
        for name, place in peaks.items():
            assert place == max(values[name], key=values[name].__getitem__)
            follow = next(turn.follow for text, turn in turns.items() if turn.follow and name in text)
            assert follow.answers == (str(values[name][place]),)


def test_switches_that_are_on_have_their_knob_at_the_right():
    seen = set()
    for seed in SEEDS:
        pixels, turns = asked("screens", "switch", seed)
        for turn in turns.values():
            left, top, right, bottom = turn.box
            middle, radius = (top + bottom) // 2, (bottom - top) // 2
            at_right = pixels[middle, right - radius].min() == 250
            assert at_right != (pixels[middle, left + radius].min() == 250)
            assert turn.answers[0] == ("yes" if at_right else "no")
            seen.add(turn.answers[0])
    assert seen == {"yes", "no"}


def test_buttons_lie_apart_and_boxes_are_told_in_the_units_of_scenes():
    assert in_units((28, 13, 141, 56)) == "02,00,11,04"
    for seed in SEEDS:
        _, turns = asked("screens", "button", seed)
        boxes = [turn.box for turn in turns.values()]
        assert len({box[1] for box in boxes}) == 1
        boxes.sort()
        assert all(one[2] < other[0] for one, other in itertools.pairwise(boxes))
        assert all(turn.answers == (in_units(turn.box),) for turn in turns.values())


def shares_of(pixels):
    """Share of the picture that is nearest to each colour of the scenes, by every fifth pixel each way."""
    pixels = pixels[::5, ::5]
    distance = np.abs(pixels[:, :, None] - np.array(COLOUR_RGB)).sum(axis=3)
    return dict(
        zip(
            SCENE_COLOURS,
            np.bincount(distance.argmin(axis=2).ravel(), minlength=8) / distance[..., 0].size,
            strict=True,
        )
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_large_areas_are_large(seed):
    pixels, turns = asked("whole", "colour", seed)
    shares = shares_of(pixels)
    (main,) = (turn.answers[0] for text, turn in turns.items() if "ount the" not in text and "How many" not in text)
    assert main == max(shares, key=shares.__getitem__)
    pixels, turns = asked("whole", "presence", seed)
    shares = shares_of(pixels)
    for colour, answer in answers(turns, r"a large (\w+) area").items():
        assert (answer == "yes") == (shares[colour] > 0.07), (colour, shares)


@pytest.mark.parametrize("seed", SEEDS)
def test_dark_pictures_are_dark(seed):
    pixels, turns = asked("whole", "light", seed)
    (answer,) = (turn.answers[0] for turn in turns.values() if turn.answers[0] in ("dark", "light"))
    assert answer == ("dark" if pixels.mean() < 90 else "light")
    assert not 90 < pixels.mean() < 160
    said = {text: turn.answers[0] for text, turn in turns.items()}
    assert all((said[text] == "yes") == (answer == "dark") for text in said if "dark" in text and "or" not in text)


@pytest.mark.parametrize("seed", range(20, 30))
def test_a_caption_names_both_colours(seed):
    pixels, turns = asked("whole", "caption", seed)
    (turn,) = turns.values()
    shares = shares_of(pixels)
    ink, kind, _, ground = turn.answers[0].split()
    assert {ink, ground} == set(sorted(shares, key=shares.__getitem__)[-2:])
    if kind in ("dots", "bricks"):  # bricks leave narrow joints, dots most of the ground
        assert (shares[ink] > shares[ground]) == (kind == "bricks")
    assert turn.answers[1] == f"{ground} with {ink} {kind}"


@pytest.mark.parametrize("ground", [name for name in GROUNDS if name not in PHOTOGRAPHIC])
def test_a_scene_on_a_ground_is_the_scene(ground):
    plain = draw_scene(scene_seed(ground, 44, EVALUATION))
    example = draw("grounds", ground, 44, EVALUATION, turns=9)
    assert {(turn.question, turn.answers[0]) for turn in example.turns} == {
        (question.text, question.answer) for question in plain.questions
    }
    before, now = (np.asarray(image, np.int64) for image in (plain.image, example.images[0]))
    box = plain.question("number").box[0]
    left, top, right, bottom = box
    inside = np.abs(before - now)[top + 6 : bottom - 6, left + 6 : right - 6].mean()
    corner = np.abs(before - now)[:20, :20].mean()
    if ground == "faint":
        assert inside > 20
        assert corner == 0
    else:
        assert inside < 1, "objects cover the ground"
        assert np.abs(before - now).mean() > 8


def test_the_kinds_of_questions_come_in_turn_on_a_ground():
    metrics = [draw("grounds", "faint", seed, EVALUATION).turns[0].metric for seed in range(9)]
    assert metrics.count("iou") == 1
    alone = draw("grounds-faint", "box", 3, EVALUATION)
    assert alone.turns[0].metric == "iou"
    assert alone.images[0].tobytes() == draw("grounds", "faint", 3, EVALUATION).images[0].tobytes()


def test_conversations_end_on_what_follows_from_the_turn_before():
    ends = []
    for seed in range(12):
        example = draw("chat", "scene", seed, EVALUATION)
        assert 2 <= len(example.turns) <= 5
        *_, before, last = example.turns
        if last.question.startswith("Is it"):
            middle = [sum(before.box[axis::2]) / 2 / example.images[0].size[axis] for axis in (0, 1)]
            words = ("left", "right") if "left" in last.question else ("top", "bottom")
            assert last.answers == (words[middle["top" in last.question] >= 0.5],)
        ends.append(last.question.startswith("Is it"))
    assert 0 < sum(ends) < 12
