"""The grid that is compared."""

import pytest

from sparsevlm.evaluation import ALL, DENSE, DOWNSAMPLE, EvalConfig, make_settings
from sparsevlm.evaluation.suites.demo import DemoSuite
from sparsevlm.evaluation.suites.registry import open_suite
from sparsevlm.scenes import LAYOUTS, TASKS
from sparsevlm.selection.selectors import SELECTORS


def config(**options):
    return EvalConfig("demo", "bundled", **options)


def names(**options):
    return [setting.name for setting in make_settings(config(**options))]


def test_dense_comes_first_and_only_random_varies_with_the_seed():
    assert names(selectors=("sparsevlm", "random", DOWNSAMPLE), keeps=(0.5, 64), seeds=(0, 3)) == [
        "dense",
        "sparsevlm-keep0.5",
        "sparsevlm-keep64",
        "random-keep0.5-seed0",
        "random-keep0.5-seed3",
        "random-keep64-seed0",
        "random-keep64-seed3",
        "downsample-keep0.5",
        "downsample-keep64",
    ]


def test_adaptive_is_no_size_of_a_picture():
    assert names(selectors=("sparsevlm", DOWNSAMPLE), keeps=(None,)) == ["dense", "sparsevlm-keepadaptive"]


def test_all_is_everything_there_is():
    found = {setting.selector for setting in make_settings(config(selectors=(ALL,)))}
    assert found == {*SELECTORS, DENSE, DOWNSAMPLE}


def test_all_takes_in_what_is_named_beside_it():
    assert config(selectors=(ALL, "sparsevlm")) == config(selectors=(ALL,))


def test_what_is_said_twice_runs_once():
    twice = {"selectors": ("random", "random"), "keeps": (0.5, 0.50, 1, 1.0, None, None), "seeds": (0, 0)}
    assert names(**twice) == [
        "dense",
        "random-keep0.5-seed0",
        "random-keep1-seed0",
        "random-keep1.0-seed0",
        "random-keepadaptive-seed0",
    ]
    once = {"selectors": ("random",), "keeps": (0.5, 1, 1.0, None), "seeds": (0,)}
    assert config(**twice).digest() == config(**once).digest()


def test_options_reach_the_pruning():
    options = {"tau": 0.3, "recycle": False, "schedule": "single"}
    found = make_settings(config(selectors=("sparsevlm", "random"), seeds=(5,), target_layers=(2, 4), options=options))
    ours, random = found[1].pruning, found[2].pruning
    assert (ours.tau, ours.recycle, ours.schedule, ours.target_layers, ours.seed) == (0.3, False, "single", (2, 4), 0)
    assert (random.seed, random.keep) == (5, 0.5)


def test_a_preset_is_a_budget():
    found = make_settings(config(selectors=("sparsevlm",), keeps=(None,), options={"preset": "paper-64"}))
    assert found[1].pruning.target_layers == (2, 6, 15)
    with pytest.raises(ValueError, match="is itself a budget"):
        make_settings(config(selectors=("sparsevlm",), options={"preset": "paper-64"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selectors": ("sparsevlm", "best")}, "there is no selector 'best'; there are"),
        ({"options": {"taus": 0.5}}, "unknown option taus (did you mean 'tau'?); the options are"),
        ({"options": {"keep": 0.5}}, "--set keep=… is not for --set"),
        ({"options": {"tau": 2}}, "tau must be in"),
        ({"keeps": (1.5,)}, "must be in (0, 1]"),
    ],
)
def test_what_does_not_exist_is_named(options, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        make_settings(config(**options))
    assert message in str(caught.value)


def test_the_digest_names_the_configuration():
    assert config().digest() == config().digest()
    assert len({config(limit=limit).digest() for limit in (None, 1, 2)}) == 3


def test_scenes_are_held_out_and_come_in_order():
    suite = DemoSuite()
    rows = list(suite.rows("number", 3))
    assert suite.tasks == TASKS
    assert [row.id for row in rows] == ["500000", "500001", "500002"]
    first, again = rows[0].load(), next(suite.rows("number", 1)).load()
    assert first.images[0].tobytes() == again.images[0].tobytes()
    assert len(first.answers) == 1
    assert next(suite.rows("box", 1)).load().metric == "iou"
    assert len(next(suite.rows("pair", 1)).load().images) == 2
    assert suite.fingerprint() == DemoSuite().fingerprint() != DemoSuite("demo", 1).fingerprint()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "square"])
def test_scenes_of_another_layout(layout):
    suite = DemoSuite(f"demo-{layout}", 7)
    assert suite.name == f"demo-{layout}"
    assert "pair" not in suite.tasks
    (image,) = next(suite.rows("count", 1)).load().images
    assert image.size == (LAYOUTS[layout].width, LAYOUTS[layout].height)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scenes", {}, "there is no suite 'scenes'; give demo"),
        ("demo-round", {}, "there is no suite 'demo-round'; of bundled scenes there are demo, demo-"),
        ("demo", {"first_seed": 1_000_000}, "may have been trained on"),
        ("demo", {"tasks": ("number", "poem")}, "suite demo has no task 'poem'; it has number, word"),
        ("missing.jsonl", {}, "missing.jsonl does not exist"),
        ("missing.jsonl", {"first_seed": 3}, "--first-seed is of what is drawn only"),
    ],
)
def test_a_suite_that_does_not_exist_is_named(name, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_suite(EvalConfig(name, "bundled", **options))
