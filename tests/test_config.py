"""Options: presets, replacement, immutability."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

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
    assert make_selector(SparseVLMConfig()).name == "span"
    assert SparseVLMConfig(preset="paper-64").selector == "sparsevlm"
    assert SparseVLMConfig().replace(preset="paper-64").selector == "sparsevlm"
    assert SparseVLMConfig(preset="paper-64", selector="span").selector == "span"
    assert SparseVLMConfig(selector="span").replace(preset="paper-64").selector == "span"
    assert SparseVLMConfig(selector="fastv").replace(preset="paper-64").selector == "fastv"


def test_numbers_of_numpy_are_numbers():
    config = SparseVLMConfig(keep=np.float32(0.5), n_vis=np.int64(256), target_layers=range(2, 10, 4))
    assert (config.keep, config.target_layers) == (0.5, (2, 6))
    assert SparseVLMConfig(keep=np.int64(100)).keep == 100


def test_heads():
    assert SparseVLMConfig().heads == "all"
    assert SparseVLMConfig().replace(heads="visual").heads == "visual"
    with pytest.raises(ValueError, match="heads must be one of 'all', 'visual', got 'text'"):
        SparseVLMConfig(heads="text")


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
