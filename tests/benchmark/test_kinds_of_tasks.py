"""Tables over all kinds of tasks of a model: which rows they take, and what they say."""

from __future__ import annotations

import pytest
from benchmark.accuracy_rows import interval_of_mean, of_suites
from benchmark.accuracy_runs import SUITES
from benchmark.families import families_figure, families_table


def row(suite, selector="random", keep="0.25", retained=90.0, **changes):
    made = {"model": "bundled", "suite": suite, "task": "average", "selector": selector, "keep": keep, "n": "200"}
    made |= {"retained": str(retained), "ci_low": str(retained - 3), "ci_high": str(retained + 3), "options": ""}
    made |= {"dense_score": "0.9", "avg_tokens": "64.0", "target_layers": "default", "dtype": "bfloat16"}
    made |= {"device": "D", "torch": "2.11", "transformers": "5.17", "commit": "new", "timestamp": "2"}
    made |= {"weights": "w", "data": suite, "seed": "", "run": f"{suite}-run"}
    return made | changes


def both(selector, *retained, **changes):
    return [
        row(suite, selector, retained=one, **changes) for suite, one in zip(SUITES["bundled"], retained, strict=True)
    ]


def test_a_line_for_each_setting_by_budget_and_average():
    rows = both("grid", 60, 70) + both("dense", 100, 100, keep="1.0", avg_tokens="256.0") + both("random", 80, 90)
    rows += both("span-features", 97, 99, keep="adaptive") + both("random", 90, 95, keep="0.5")
    lines = families_table(rows).splitlines()
    assert lines[0] == "| selector | keep | visual tokens | average | scenes | grounds |"
    assert lines[2:7] == [
        "| dense | – | 256 | 90.0 % | 90.0 % | 90.0 % |",
        "| random | 0.5 | 64 | **92.5** [90.4, 94.6] | 90.0 | 95.0 |",
        "| random | 0.25 | 64 | **85.0** [82.9, 87.1] | 80.0 | 90.0 |",
        "| grid | 0.25 | 64 | **65.0** [62.9, 67.1] | 60.0 | 70.0 |",
        "| span-features | adaptive | 64 | **98.0** [95.9, 100.1] | 97.0 | 99.0 |",
    ]
    assert "n = 200 hold-out questions a cell" in lines[-1]
    assert "commit new" in lines[-1]


def test_the_newest_commit_that_has_all_suites_is_taken():
    """A newer one has a single suite, an older one all; of two runs of a suite the later counts."""
    rows = both("grid", 60, 70, commit="old", timestamp="1") + both("grid", 50, 70)
    rows += [
        row("demo", "grid", retained=10.0, commit="part", timestamp="9"),
        row("demo", "grid", retained=80.0, timestamp="3"),
    ]
    assert families_figure(rows) == "75.0"
    assert families_figure([one for one in rows if one["commit"] != "new"]) == "65.0"


def test_options_and_target_layers_are_settings_of_their_own():
    """And a task of a suite, or a suite that the model does not answer about, is none."""
    rows = both("dense", 100, 100, keep="1.0") + both("grid", 60, 70) + both("grid", 40, 50, options="seed=3")
    rows += both("grid", 20, 30, target_layers="4 8") + both("dense", 100, 100, keep="1.0", options="seed=3")
    rows += [*both("grid", 3, 3, task="count"), row("documents", "grid", retained=4.0)]
    lines = families_table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:-2]] == [
        "| dense", "| grid", "| grid (seed=3)", "| grid (target layers 4 8)"
    ]  # fmt: skip
    assert families_figure([one for one in rows if one["options"] and one["selector"] == "grid"]) == "45.0"


def test_a_small_run_takes_no_place_in_a_table():
    """Someone tries the command with few questions, at a newer commit, or some rows of a run failed."""
    rows = (
        both("grid", 60, 70) + both("grid", 1, 2, commit="newer", timestamp="9", n="20") + both("random", 8, 9, n="199")
    )
    assert families_figure(rows) == "65.0"
    assert list(of_suites(rows)) == [("grid", "0.25", "default", "", "")]


@pytest.mark.parametrize(
    ("name", "value"),
    [("weights", "v"), ("device", "CPU"), ("dtype", "float32"), ("data", "d"), ("dense_score", "0.88")],
)
def test_what_was_measured_otherwise_is_not_mixed_in(name, value):
    rows = [*both("grid", 60, 70), row("demo", "random", run="other", **{name: value})]
    with pytest.raises(ValueError, match=f"demo-run and other at new differ in {name}: take out the rows"):
        families_table(rows)


def test_an_answer_that_is_nearly_tied_is_no_other_measurement():
    rows = [*both("grid", 60, 70), *both("random", 50, 60, run="other", dense_score="0.895")]
    assert len(of_suites(rows)) == 2


def test_draws_of_several_seeds_are_settings_of_their_own():
    rows = both("random", 60, 70, seed="0") + both("random", 50, 60, seed="3")
    assert [line.split(" | ")[0] for line in families_table(rows).splitlines()[2:4]] == [
        "| random",
        "| random (seed 3)",
    ]


def test_a_setting_that_a_suite_lacks_has_no_line():
    rows = [*both("grid", 60, 70), row("demo", "random")]
    assert list(of_suites(rows)) == [("grid", "0.25", "default", "", "")]


def test_the_interval_is_that_of_a_mean_of_independent_draws():
    (by_suite,) = of_suites(both("grid", 60, 70)).values()
    assert interval_of_mean(by_suite) == pytest.approx((65 - 3 / 2**0.5, 65 + 3 / 2**0.5))


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"of one model, its filter finds \['bundled', 'smol'\]"):
        families_table([row("demo"), row("documents", model="smol")])
    with pytest.raises(
        ValueError, match=r"of 200 questions or more of all of demo, grounds: python -m benchmark\.accuracy_runs"
    ):
        families_table([row("demo"), row("grounds", commit="old")])
    with pytest.raises(ValueError, match="one selector at one budget, its filter finds 2"):
        families_figure(both("grid", 60, 70) + both("random", 60, 70))
