"""Scenes: the same seed gives the same scene, alone or in a batch, and the answers agree with the content."""

import sys

import numpy as np
import pytest
import torch

from sparsevlm.scenes import (
    CARD,
    COLOURS,
    GLYPHS,
    HOLDOUT_SEEDS,
    LAYOUTS,
    NO_PIECE,
    PAIR,
    PAIR_LAYOUT,
    PIECES,
    QUESTION_TEXTS,
    SINGLE_TASKS,
    TASKS,
    TRAINING_SEEDS,
    Layout,
    ask,
    ask_pair,
    cell_contents,
    draw_example,
    draw_scene,
    holdout_seeds,
    picture_boxes,
    render,
    sample_specs,
    training_seeds,
)
from sparsevlm.scenes.atlas import _glyph_masks
from sparsevlm.scenes.vocabulary import WORDS


def answers_of(questions, column=0):
    """Answers of all scenes in one column, as text."""
    return [
        "".join(PIECES[piece] for piece in row if piece != NO_PIECE) for row in questions.pieces[:, column].tolist()
    ]


def texts_of(questions, column=0):
    return [QUESTION_TEXTS[i] for i in questions.text_ids[:, column]]


def ask_one(spec, task):
    return ask(spec, torch.full((spec.batch, 1), TASKS.index(task)))


def cards_of(spec, row):
    """Text on each card of a scene by colour, read off the specification."""
    texts = ["".join(GLYPHS[glyph] for glyph in card if glyph != NO_PIECE) for card in spec.card_glyphs[row].tolist()]
    return {COLOURS[colour]: text for colour, text in zip(spec.card_colours[row].tolist(), texts, strict=True)}


def test_same_seed_same_scene():
    first, second = draw_scene(7), draw_scene(7)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert first.questions == second.questions
    assert not np.array_equal(np.asarray(first.image), np.asarray(draw_scene(8).image))


def test_known_scene_does_not_drift():
    scene = draw_scene(0)
    assert scene.image.size == (448, 448)
    assert [(q.task, q.text, q.answer) for q in scene.questions] == [
        ("number", "Read the number on the red card.", "755"),
        ("word", "Read the word on the purple card.", "RUN"),
        ("colour", "What colour is the cross?", "blue"),
        ("exist", "Does the picture show an orange cross?", "no"),
        ("count", "How many red shapes are there?", "0"),
        ("half", "Is the cyan card in the top or bottom half?", "top"),
        ("compare", "Is the number on cyan or on red larger?", "red"),
        ("list", "List all cards.", "red 755, purple RUN, cyan 158"),
        ("box", "Where is the square?", "06,15,10,19"),
    ]
    assert scene.question("number").box == ((160, 174, 226, 213),)


def test_batch_equals_single():
    seeds = holdout_seeds(20, 4)
    spec = sample_specs(seeds)
    images = render(spec)
    questions = ask(spec, torch.arange(len(SINGLE_TASKS)).expand(4, -1))
    for row, seed in enumerate(seeds.tolist()):
        scene = draw_scene(seed)
        assert np.array_equal(np.asarray(scene.image), images[row].permute(1, 2, 0).numpy())
        for column, question in enumerate(scene.questions):
            assert question.text == texts_of(questions, column)[row]
            assert question.answer == answers_of(questions, column)[row]


def test_seed_ranges_are_disjoint_and_checked():
    assert not set(HOLDOUT_SEEDS) & set(training_seeds(TRAINING_SEEDS.start, 1000).tolist())
    assert HOLDOUT_SEEDS.stop <= TRAINING_SEEDS.start
    with pytest.raises(ValueError, match="training seeds must lie"):
        training_seeds(HOLDOUT_SEEDS.stop - 1, 1)
    with pytest.raises(ValueError, match="hold-out seeds must lie"):
        holdout_seeds(HOLDOUT_SEEDS.stop - 1, 2)
    with pytest.raises(ValueError, match="seed must lie"):
        draw_scene(-1)


@pytest.fixture(scope="module")
def many():
    return sample_specs(holdout_seeds(0, 2000))


def test_every_scene_can_be_asked_everything(many):
    kinds, _ = cell_contents(many)
    is_shape = (kinds >= 0) & (kinds < CARD)
    assert ((kinds == CARD).sum(1) == 3).all()
    assert ((is_shape.sum(1) >= 4) & (is_shape.sum(1) <= 6)).all()
    assert all(sum(text.isdigit() for text in cards_of(many, row).values()) == 2 for row in range(100))
    assert all(any(text in WORDS for text in cards_of(many, row).values()) for row in range(100))
    assert {len(word) for word in WORDS} == {3, 4}


def test_texts_on_cards_are_asked_for_and_listed(many):
    for task in ("number", "word"):
        questions = ask_one(many, task)
        for row, (text, answer) in enumerate(zip(texts_of(questions), answers_of(questions), strict=True)):
            (colour,) = [name for name in COLOURS if f" {name} card" in text]
            assert cards_of(many, row)[colour] == answer
    for row, answer in enumerate(answers_of(ask_one(many, "list"))):
        cards = cards_of(many, row)
        assert answer == ", ".join(f"{name} {cards[name]}" for name in COLOURS if name in cards)


def test_the_larger_number_is_the_answer(many):
    questions = ask_one(many, "compare")
    first = 0
    for row, (text, answer) in enumerate(zip(texts_of(questions), answers_of(questions), strict=True)):
        cards = {name: int(value) for name, value in cards_of(many, row).items() if value.isdigit()}
        assert all(name in text for name in cards)
        assert answer == max(cards, key=cards.get)
        first += text.index(answer) == min(text.index(name) for name in cards)
    assert 0.45 < first / 2000 < 0.55, "the order of the names tells nothing"


def test_colours_and_counts_agree_with_content(many):
    kinds, colours = cell_contents(many)
    is_shape = (kinds >= 0) & (kinds < CARD)
    asked = ask_one(many, "colour")
    kind = torch.where(asked.cells[:, 0], kinds, -1).amax(1)
    assert ((kinds == kind[:, None]).sum(1) == 1).all(), "colour is asked of a kind that occurs once"
    wanted = [COLOURS[i] for i in torch.where(asked.cells[:, 0], colours, -1).amax(1).tolist()]
    assert answers_of(asked) == wanted

    asked = ask_one(many, "count")
    counts = [int(answer) for answer in answers_of(asked)]
    for row, text in enumerate(texts_of(asked)):
        colour = next(i for i, name in enumerate(COLOURS) if f" {name} " in text)
        assert counts[row] == int((is_shape[row] & (colours[row] == colour)).sum())
    assert np.bincount(counts, minlength=6).min() / 2000 > 0.05
    frequent = sum(
        counts_of.max() / counts_of.sum()
        for counts_of in (torch.bincount(colours[row][is_shape[row]]) for row in range(2000))
    )
    assert frequent / 2000 < 0.55, "the most frequent colour is no good guess"


def test_existence_is_balanced_and_hard(many):
    kinds, colours = cell_contents(many)
    asked = ask_one(many, "exist")
    yes = torch.tensor([answer == "yes" for answer in answers_of(asked)])
    assert 0.45 < yes.float().mean() < 0.55
    assert torch.equal(asked.cells[:, 0].any(1), yes)
    is_shape = (kinds >= 0) & (kinds < CARD)
    shapes = [torch.unique(colours[row][is_shape[row]]).tolist() for row in range(2000)]
    no_hard = [
        any(f" {COLOURS[colour]} " in text for colour in shapes[row])
        for row, text in enumerate(texts_of(asked))
        if not yes[row]
    ]
    assert np.mean(no_hard) > 0.75, "most things that are not there have a colour that is"


def test_boxes_are_told_in_patches(many):
    asked = ask_one(many, "box")
    boxes = picture_boxes(many)
    for row, answer in enumerate(answers_of(asked)):
        left, top, right, bottom = boxes[row][asked.cells[row, 0]][0].tolist()
        assert answer == f"{left // 14:02d},{top // 14:02d},{-(-right // 14):02d},{-(-bottom // 14):02d}"


def test_pairs_are_asked_about_the_right_picture():
    specs = [sample_specs(holdout_seeds(0, 500), PAIR_LAYOUT, picture) for picture in range(2)]
    questions = ask_pair(*specs, 2)
    asked_which = 0
    for row in range(500):
        cards = [cards_of(spec, row) for spec in specs]
        text, answer = texts_of(questions)[row], answers_of(questions)[row]
        (colour,) = [name for name in COLOURS if f" {name} card" in text]
        if text.startswith("Which picture"):
            asked_which += 1
            assert [colour in one for one in cards] == [answer == "first", answer == "second"]
        else:
            assert cards["second picture" in text][colour] == answer
    assert 150 < asked_which < 350


def test_examples_are_the_scenes_of_their_seed():
    for layout in LAYOUTS:
        scene = draw_scene(11, LAYOUTS[layout])
        example = draw_example("number", 11, layout)
        assert (example.question, example.answer) == (scene.question("number").text, scene.question("number").answer)
        assert np.array_equal(np.asarray(example.images[0]), np.asarray(scene.image))
    first, second = draw_example(PAIR, 11).images
    assert first.size == second.size == (448, 336)
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    for wrong in ({"task": "smell"}, {"layout": "round"}, {"seed": -1}):
        with pytest.raises(ValueError, match=r"no task|no layout|seed must lie"):
            draw_example(**{"task": "number", "seed": 0, **wrong})


def test_too_small_layouts_are_refused():
    with pytest.raises(ValueError, match="at least 9 cells"):
        sample_specs(holdout_seeds(0, 1), Layout(rows=2, cols=2))
    with pytest.raises(ValueError, match="too small"):
        draw_scene(0, Layout(cell=96))


def test_other_layouts_draw():
    scene = draw_scene(3, Layout(rows=3, cols=6))
    assert scene.image.size == (672, 336)


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"drawn scenes.*the extra cli"):
        _glyph_masks()
