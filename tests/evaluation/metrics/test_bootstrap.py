"""What is retained, and how sure that is."""

import numpy as np
import pytest

from sparsevlm.evaluation.metrics.bootstrap import retained


def pair(pruned, dense):
    return np.array(pruned, dtype=float), np.array(dense, dtype=float)


def test_by_hand():
    found = retained({"a": pair([1, 0, 1, 0], [1, 1, 1, 0])})
    assert found.value == pytest.approx(100 * 2 / 3)
    # Of four rows drawn, the ratio is 1 − (draws of row 1) / (draws of rows 0, 1, 2): anything from 0 to 1.
    assert 0 <= found.low < found.value < found.high <= 100


def test_nothing_lost_has_no_width():
    found = retained({"a": pair([1, 1, 0, 1], [1, 1, 0, 1])})
    assert (found.value, found.low, found.high) == (100, 100, 100)


def test_every_task_counts_the_same():
    many, few = pair([1] * 90 + [0] * 10, [1] * 100), pair([1, 0], [1, 1])
    assert retained({"many": many, "few": few}).value == pytest.approx((90 + 50) / 2)


def test_without_a_dense_score_there_is_no_ratio():
    nothing = retained({"a": pair([0, 1], [0, 0])})
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all()
    assert np.isnan(retained({}).value)
    one = retained({"a": pair([0, 1], [0, 0]), "b": pair([1, 1], [1, 1]), "c": pair([], [])})
    assert one.value == 100


def test_a_single_row_has_no_interval():
    for tasks in ({"a": pair([1], [1])}, {"a": pair([1], [1]), "b": pair([1, 0], [1, 1])}):
        found = retained(tasks)
        assert found.value == 100 * (1 + 0.5 * (len(tasks) == 2)) / len(tasks)
        assert np.isnan([found.low, found.high]).all()


def test_the_same_scores_give_the_same_interval():
    scores = pair([1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 1])
    assert retained({"a": scores}) == retained({"a": scores})


def test_rows_are_drawn_in_pairs():
    """Where both models fail on the same rows, nothing is uncertain; with rows out of step much is."""
    rng = np.random.default_rng(0)
    dense = (rng.random(200) < 0.6).astype(float)
    assert retained({"a": (dense, dense)}).low == 100
    shuffled = retained({"a": (rng.permutation(dense), dense)})
    assert shuffled.high - shuffled.low > 20


def test_the_interval_covers_the_truth():
    """95 % nominal; 300 experiments of 150 rows leave a standard error of 1.3 points."""
    rng = np.random.default_rng(1)
    n_rows, n_experiments, truth = 150, 300, 100 * 0.9
    covered = 0
    for _ in range(n_experiments):
        dense = (rng.random(n_rows) < 0.95).astype(float)
        pruned = dense * (rng.random(n_rows) < 0.9)
        found = retained({"a": (pruned, dense)})
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / n_experiments <= 0.985


def test_tasks_are_drawn_independently():
    """The average of two equal tasks is surer than either, by about the square root of two."""
    rng = np.random.default_rng(2)
    dense = np.ones(400)
    pruned = (rng.random(400) < 0.8).astype(float)
    one, two = retained({"a": (pruned, dense)}), retained({"a": (pruned, dense), "b": (pruned, dense)})
    assert (one.high - one.low) / (two.high - two.low) == pytest.approx(2**0.5, rel=0.12)


def test_as_scipy_does():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    dense = (rng.random(500) < 0.9).astype(float)
    pruned = dense * (rng.random(500) < 0.85)
    theirs = stats.bootstrap(
        (pruned, dense),
        lambda one, other, axis=-1: 100 * one.mean(axis) / other.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(4),
    ).confidence_interval
    ours = retained({"a": (pruned, dense)})
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.4)
