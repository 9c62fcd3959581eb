"""Options: presets, replacement, immutability."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from sparsevlm import SparseVLMConfig
from sparsevlm.selection.selectors import make_selector


def test_a_preset_is_a_whole_budget():
    config = SparseVLMConfig(preset="paper-64")
    assert config.target_layers == (2, 6, 15)
    for conflict in ({"keep": 0.5}, {"schedule": [5]}, {"target_layers": [1]}, {"tau": 0.1}, {"merge": "sum"}):
        with pytest.raises(ValueError, match="preset"):
            SparseVLMConfig(preset="paper-64", **conflict)
    assert SparseVLMConfig(preset="paper-64", min_keep=8).min_keep == 8
    with pytest.raises(ValueError, match="'paper-192', 'paper-128', 'paper-64'"):
        SparseVLMConfig(preset="paper-32")


def test_a_preset_replaces_what_was_there_and_is_replaced():
    config = SparseVLMConfig(keep=0.5, tau=0.2, selector="random").replace(preset="paper-128")
    assert (config.keep, config.tau, config.selector) == (None, 0.3, "random")
    again = config.replace(keep=0.7)
    assert (again.keep, again.schedule, again.target_layers) == (0.7, None, (2, 6, 15))


def test_the_selector_that_nobody_named():
    for at_layers in ({"target_layers": [2]}, {"schedule": "single", "keep": 0.5}, {"schedule": [9]}):
        assert make_selector(SparseVLMConfig(**at_layers)).name == "span"
    for anywhere in ({}, {"keep": 0.5}, {"min_keep": 3}, {"schedule": "single"}):  # the last does nothing alone
        assert make_selector(SparseVLMConfig(**anywhere)).name == "span-features"
    assert SparseVLMConfig(preset="paper-64").selector == "sparsevlm"
    assert SparseVLMConfig().replace(preset="paper-64").selector == "sparsevlm"
    assert SparseVLMConfig(preset="paper-64", selector="span").selector == "span"
    assert SparseVLMConfig(selector="span").replace(preset="paper-64").selector == "span"
    assert SparseVLMConfig(selector="fastv").replace(preset="paper-64").selector == "fastv"


def test_numbers_of_numpy_are_numbers():
    config = SparseVLMConfig(keep=np.float32(0.5), n_vis=np.int64(256), target_layers=range(2, 10, 4))
    assert (config.keep, config.target_layers) == (0.5, (2, 6))
    assert SparseVLMConfig(keep=np.int64(100)).keep == 100


NUMPY = {
    "keep": [(np.array([0.5, 0.25]), (0.5, 0.25)), (np.array(7), 7), ([np.float32(0.5), np.int8(3)], (0.5, 3))],
    "schedule": [(np.array([9, 5]), (9, 5)), (np.array([0.5, 0.25]), (0.5, 0.25))],
    "target_layers": [(np.array([3, 1]), (1, 3)), ([np.int64(1), np.uint8(3)], (1, 3)), (torch.tensor([1, 3]), (1, 3))],
    "min_keep": [(np.uint8(4), 4), (np.array(4), 4), (torch.tensor(4), 4)],
    "n_vis": [(np.int32(4), 4)],
    "seed": [(np.uint64(2**63 - 1), 2**63 - 1)],
    "tau": [(np.float16(0.5), 0.5), (np.array(0.5), 0.5)],
    "rank_tolerance": [(np.float32(0.5), 0.5)],
    "vision_keep": [(np.float32(0.5), 0.5)],
    "image_cache": [(np.int64(1 << 40), 1 << 40)],
    "timeout": [(np.float32(2), 2.0), (np.int64(2), 2)],
    "recycle": [(np.bool_(False), False)],
    "strict": [(np.bool_(True), True)],
    "engine": [(np.bool_(True), True), (np.array(False), False)],
    "heads": [(np.str_("visual"), "visual")],
    "weights": [(np.str_("fp8"), "fp8")],
}


@pytest.mark.parametrize(("name", "value", "plain"), [(n, *pair) for n, pairs in NUMPY.items() for pair in pairs])
def test_options_of_numpy_become_those_of_python(name, value, plain):
    """Whatever is stored can be compared, hashed and written to JSON."""
    config = SparseVLMConfig(**{name: value})
    stored = getattr(config, name)
    assert (stored, type(stored)) == (plain, type(plain))
    assert json.loads(json.dumps(dataclasses.asdict(config)))
    assert config == SparseVLMConfig(**{name: plain})
    assert hash(config) == hash(SparseVLMConfig(**{name: plain}))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("keep", np.bool_(True), TypeError),
        ("keep", np.array([]), ValueError),
        ("keep", np.zeros((2, 2)), TypeError),
        ("min_keep", np.float32(4), TypeError),
        ("seed", np.uint64(2**64 - 1), ValueError),
        ("seed", 2**70, ValueError),
        ("target_layers", np.array([[1, 2]]), TypeError),
        ("target_layers", np.array([1.0, 2.0]), TypeError),
        ("target_layers", np.int64(3), ValueError),
        ("tau", np.bool_(True), TypeError),
        ("raters", np.array(["all"]), ValueError),
        ("merge", np.array([1, 2]), ValueError),
        ("preset", np.array([1, 2]), ValueError),
        ("recycle", np.int64(1), TypeError),
        *((name, 10**400, ValueError) for name in ("keep", "min_keep", "n_vis", "seed", "tau", "timeout")),
        *((name, [10**5000, 1], ValueError) for name in ("keep", "schedule", "target_layers")),
    ],
)
def test_what_has_no_meaning_is_named(name, value, error):
    with pytest.raises(error, match=rf"{name}\b.* must be .*, got|{name} is an empty sequence"):
        SparseVLMConfig(**{name: value})


@pytest.mark.parametrize("layers", [np.array([1, 3]), [np.int64(1), np.int64(3)], torch.tensor([1, 3]), np.array([])])
def test_layers_of_numpy_beside_a_preset(layers):
    with pytest.raises(ValueError, match=r"target_layers is a part of preset='paper-64': .*; got \["):
        SparseVLMConfig(preset="paper-64", target_layers=layers)


def test_heads():
    assert SparseVLMConfig().heads == "all"
    assert SparseVLMConfig().replace(heads="visual").heads == "visual"
    with pytest.raises(ValueError, match="heads must be one of 'all', 'visual', got 'text'"):
        SparseVLMConfig(heads="text")


def test_weights():
    assert SparseVLMConfig().weights == "model"
    assert SparseVLMConfig(weights="fp8").replace(weights=None).weights == "model"
    assert SparseVLMConfig(weights="fp8", engine=True).weights == "fp8"
    with pytest.raises(ValueError, match="weights must be one of 'model', 'fp8', got 'int4'"):
        SparseVLMConfig(weights="int4")
    with pytest.raises(ValueError, match=r"weights='fp8' is read by the engine, and engine=False switches it off"):
        SparseVLMConfig(weights="fp8").replace(engine=False)


def test_turns():
    assert SparseVLMConfig().turns == "first"
    with pytest.raises(ValueError, match="turns must be one of 'first', 'refresh', 'agnostic', got 'last'"):
        SparseVLMConfig(turns="last")
    with pytest.raises(ValueError, match=r"turns='refresh' keeps the features of all visual tokens .*vision_keep=0.5"):
        SparseVLMConfig(turns="refresh", vision_keep=0.5)


def test_a_schedule_has_a_count_per_layer_or_one_more():
    """One more is for a selector that acts before the decoder as well; which it is, is known when it is applied."""
    for schedule in ([9, 5], [12, 9, 5]):
        assert SparseVLMConfig(schedule=schedule, target_layers=[1, 3]).schedule == tuple(schedule)
    for schedule in ([9], [12, 9, 5, 4]):
        with pytest.raises(ValueError, match=f"{len(schedule)} counts for 2 target layers"):
            SparseVLMConfig(schedule=schedule, target_layers=[1, 3])


def test_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseVLMConfig().keep = 0.5
