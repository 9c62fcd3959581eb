"""Options that a selector sets by itself, and those that it leaves without effect."""

from __future__ import annotations

import pytest

from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection.context import SelectorTraits
from sparsevlm.selection.overrides import OVERRIDABLE, effective_config, unused_options
from sparsevlm.selection.selectors import SELECTORS, make_selector


class Custom:
    overrides = {"tau": 0.25}  # noqa: RUF012

    def select(self, context, n_keep):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("sparsevlm", {}),
        ("sparsevlm-paper", {"raters": "embedding"}),
        ("sparsevlm-v2", {"heads": "visual", "recycle": False}),
        ("fastv", {}),
    ],
)
def test_variants(name, wanted):
    config = SparseVLMConfig(selector=name, keep=0.5, min_keep=3)
    assert effective_config(config, make_selector(config)) == config.replace(**wanted)


def test_the_options_of_a_model_stay_as_they_are():
    config = SparseVLMConfig(selector="sparsevlm-v2")
    effective_config(config, make_selector(config))
    assert (config.heads, config.recycle) == ("all", True)


def test_what_the_user_set_is_not_overruled():
    selector = Custom()
    assert effective_config(SparseVLMConfig(), selector).tau == 0.25
    assert effective_config(SparseVLMConfig(tau=0.25), selector).tau == 0.25
    with pytest.raises(ValueError, match=r"'Custom' sets tau=0.25, but tau=0.75 was asked for"):
        effective_config(SparseVLMConfig(tau=0.75), selector)


def test_a_default_that_the_user_wrote_down_is_overruled():
    config = SparseVLMConfig(selector="sparsevlm-v2", recycle=True, heads="all")
    effective = effective_config(config, make_selector(config))
    assert (effective.recycle, effective.heads) == (False, "visual")


@pytest.mark.parametrize("overrides", [["tau"], "tau", None, {3: 4}])
def test_overrides_are_a_mapping(overrides):
    selector = Custom()
    selector.overrides = overrides
    with pytest.raises(TypeError, match="'Custom': overrides must map names of options to values, got"):
        effective_config(SparseVLMConfig(), selector)


def test_the_budget_is_not_a_selectors_business():
    selector = Custom()
    selector.overrides = {"keep": 0.5}
    with pytest.raises(ValueError, match=r"overrides keep; a selector may set raters, heads"):
        effective_config(SparseVLMConfig(), selector)


def test_every_override_is_an_option():
    for option in OVERRIDABLE:
        assert hasattr(SparseVLMConfig(), option)
    for make in SELECTORS.values():
        effective_config(SparseVLMConfig(), make())


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        ({"keep": 0.5}, []),
        ({"keep": 0.5, "recycle": False, "merge": "sum", "seed": 3}, ["recycle", "merge", "seed"]),
        ({"keep": 0.5, "recycle": False, "tau": 0.1, "selector": "span-joint"}, ["tau"]),
        ({"keep": 0.5, "seed": 3, "schedule": "single", "selector": "random"}, []),
        ({"keep": 0.5, "raters": "embedding", "heads": "visual", "tau": 0.1}, ["raters", "heads", "tau"]),
        ({"raters": "embedding", "rank_lambda": 0.1, "theta": 0.2}, ["theta"]),
        ({"schedule": "single", "rank_lambda": 0.1}, ["schedule"]),
        ({"schedule": [9, 4], "rank_tolerance": 0.2}, ["rank_tolerance"]),
        ({"keep": 0.5, "selector": "sparsevlm", "raters": "all", "tau": 0.1, "theta": 0.2}, []),
        ({"keep": 0.5, "selector": "fastv", "raters": "all"}, ["raters"]),
        ({"keep": 0.5, "selector": Custom(), "raters": "all", "theta": 0.2}, []),
    ],
)
def test_options_without_effect(options, idle):
    config = SparseVLMConfig(**options)
    traits = SelectorTraits.of(make_selector(config))
    assert unused_options(config, traits, options) == idle
    assert unused_options(config, traits, []) == []
