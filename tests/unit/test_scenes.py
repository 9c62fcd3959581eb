"""Scenes: the same seed gives the same scene, alone or in a batch, and the answers agree with the content."""

import numpy as np
import pytest
import torch

from sparsevlm.scenes import (
    ANSWER_TEXTS,
    COLOURS,
    HOLDOUT_SEEDS,
    QUESTION_TEXTS,
    TASKS,
    TRAINING_SEEDS,
    Layout,
    ask,
    cell_contents,
    draw_scene,
    holdout_seeds,
    render,
    sample_specs,
    training_seeds,
)


def test_same_seed_same_scene():
    first, second = draw_scene(7), draw_scene(7)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert first.questions == second.questions
    assert not np.array_equal(np.asarray(first.image), np.asarray(draw_scene(8).image))


def test_known_scene_does_not_drift():
    scene = draw_scene(0)
    assert scene.image.size == (448, 448)
    assert [(q.task, q.text, q.answer) for q in scene.questions] == [
        ("number", "Read the number on the red card.", "354"),
        ("colour", "Which colour does the triangle have?", "orange"),
        ("exist", "Is there an orange cross?", "yes"),
        ("count", "Count the pink shapes.", "0"),
        ("half", "Is the purple card in the left or the right half?", "left"),
    ]
    assert scene.question("number").box == ((127, 171, 217, 221),)


def test_batch_equals_single():
    seeds = holdout_seeds(20, 4)
    spec = sample_specs(seeds)
    images = render(spec)
    questions = ask(spec, torch.arange(len(TASKS)).expand(4, -1))
    for row, seed in enumerate(seeds.tolist()):
        scene = draw_scene(seed)
        assert np.array_equal(np.asarray(scene.image), images[row].permute(1, 2, 0).numpy())
        assert [q.text for q in scene.questions] == [QUESTION_TEXTS[i] for i in questions.text_ids[row]]
        assert [q.answer for q in scene.questions] == [ANSWER_TEXTS[i] for i in questions.answer_ids[row]]


def test_seed_ranges_are_disjoint_and_checked():
    assert not set(HOLDOUT_SEEDS) & set(training_seeds(TRAINING_SEEDS.start, 1000).tolist())
    assert HOLDOUT_SEEDS.stop <= TRAINING_SEEDS.start
    with pytest.raises(ValueError, match="training seeds must lie"):
        training_seeds(HOLDOUT_SEEDS.stop - 1, 1)
    with pytest.raises(ValueError, match="hold-out seeds must lie"):
        holdout_seeds(HOLDOUT_SEEDS.stop - 1, 2)
    with pytest.raises(ValueError, match="seed must lie"):
        draw_scene(-1)


def test_answers_agree_with_content():
    spec = sample_specs(holdout_seeds(0, 2000))
    kinds, colours = cell_contents(spec)
    is_card, is_shape = kinds == 8, (kinds >= 0) & (kinds < 8)
    assert (is_card.sum(1) == 3).all()
    assert ((is_shape.sum(1) >= 3) & (is_shape.sum(1) <= 6)).all()
    task_ids = {task: i for i, task in enumerate(TASKS)}
    asked = {task: ask(spec, torch.full((2000, 1), i)) for task, i in task_ids.items()}

    colour_kind = torch.where(asked["colour"].cells[:, 0], kinds, -1).amax(1)
    assert ((kinds == colour_kind[:, None]).sum(1) == 1).all(), "colour is asked of a kind that occurs once"

    count_texts = [QUESTION_TEXTS[i] for i in asked["count"].text_ids[:, 0]]
    counts = [int(ANSWER_TEXTS[i]) for i in asked["count"].answer_ids[:, 0]]
    for row in range(100):
        colour = next(i for i, name in enumerate(COLOURS) if f" {name} " in count_texts[row])
        assert counts[row] == int((is_shape[row] & (colours[row] == colour)).sum())
    shares = np.bincount(counts, minlength=7) / 2000
    assert shares.min() > 0.08

    yes = torch.tensor([ANSWER_TEXTS[i] == "yes" for i in asked["exist"].answer_ids[:, 0]])
    assert 0.45 < yes.float().mean() < 0.55
    assert torch.equal(asked["exist"].cells[:, 0].any(1), yes)


def test_too_small_layouts_are_refused():
    with pytest.raises(ValueError, match="at least 9 cells"):
        sample_specs(holdout_seeds(0, 1), Layout(rows=2, cols=2))
    with pytest.raises(ValueError, match="too small"):
        draw_scene(0, Layout(cell=96))


def test_other_layouts_draw():
    scene = draw_scene(3, Layout(rows=3, cols=6))
    assert scene.image.size == (672, 336)
