"""Options that a selector sets by itself, and those that it leaves without effect."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from selector_contexts import make_context

from sparsevlm import apply_sparsevlm
from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection.context import Selection, SelectorTraits
from sparsevlm.selection.overrides import OVERRIDABLE, effective_config, unused_options
from sparsevlm.selection.selectors import (
    SELECTORS,
    HiPruneSelector,
    MMTokSelector,
    ScopeSelector,
    SpanJointSelector,
    SpanPriorSelector,
    SparseVLMPaperSelector,
    SparseVLMSelector,
    SparseVLMv2Selector,
    VisionZipSelector,
    make_selector,
)
from toys import make_inputs, tiny_model


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
        ({"raters": "embedding", "rank_lambda": 0.1, "theta": 0.2}, ["raters", "theta", "rank_lambda"]),
        ({"raters": "embedding", "rank_lambda": 0.1, "theta": 0.2, "selector": "span"}, ["theta"]),
        ({"raters": "embedding", "rank_lambda": 0.1, "target_layers": [2]}, []),
        ({"schedule": "single", "rank_lambda": 0.1, "selector": "span"}, ["schedule"]),
        ({"schedule": "single", "rank_lambda": 0.1}, ["schedule", "rank_lambda"]),
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


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_built_in_selectors_are_values(name):
    made = SELECTORS[name]
    one, other = made(), made()
    assert one == other
    assert hash(one) == hash(other)
    options = {field.name: field.default for field in dataclasses.fields(one)}
    assert made(**options) == one
    assert not set(options) & {"name", "placement", "needs", "default_schedule", "overrides", "reads"}
    for option in options:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one, option, 0.1)


def test_a_selector_made_by_name_takes_the_option_and_an_object_its_own():
    by_name = SparseVLMConfig(selector="sparsevlm", tau=0.3)
    assert make_selector(by_name).tau is None
    assert effective_config(by_name, make_selector(by_name)).tau == 0.3
    own = SparseVLMSelector(tau=0.3, theta=0.2)
    effective = effective_config(SparseVLMConfig(selector=own), own)
    assert (effective.tau, effective.theta) == (0.3, 0.2)
    assert effective_config(SparseVLMConfig(selector=own, tau=0.3), own).tau == 0.3
    with pytest.raises(ValueError, match=r"'sparsevlm' sets tau=0.3, but tau=0.7 was asked for"):
        effective_config(SparseVLMConfig(selector=own, tau=0.7), own)
    assert SparseVLMv2Selector(theta=0.1).overrides == {"heads": "visual", "recycle": False, "theta": 0.1}
    assert SparseVLMPaperSelector().overrides == {"raters": "embedding"}


def test_tau_and_theta_of_an_object_are_those_of_the_options():
    attention = torch.arange(40.0).expand(2, -1)
    for fields in ({"tau": 0.0}, {"tau": 0.9, "theta": 0.8}, {"theta": 0.1}):
        context = make_context(40, rater_attention=attention, config=SparseVLMConfig(min_keep=1))
        given = make_context(40, rater_attention=attention, config=SparseVLMConfig(min_keep=1, **fields))
        found, wanted = SparseVLMSelector(**fields).select(context, 20), SparseVLMSelector().select(given, 20)
        assert torch.equal(found.keep_idx, wanted.keep_idx)
        assert (found.recycled_idx is None) == (wanted.recycled_idx is None)
        if found.recycled_idx is not None:
            assert torch.equal(found.recycled_idx, wanted.recycled_idx)


def test_fields_change_the_choice():
    context = make_context(60)

    def kept(selector):
        found = selector.select(context, 20)
        return (found.keep_idx if isinstance(found, Selection) else found).tolist()

    for plain, other in (
        (HiPruneSelector(), HiPruneSelector(alpha=0.9)),
        (ScopeSelector(), ScopeSelector(alpha=6.0)),
        (MMTokSelector(), MMTokSelector(alpha=20.0, visual_temperature=0.05)),
        (VisionZipSelector(), VisionZipSelector(contextual=40)),
        (SpanJointSelector(), SpanJointSelector(alpha=1.0)),
        (SpanPriorSelector(), SpanPriorSelector(alpha=1.0, least=0.5)),
    ):
        assert kept(plain) != kept(other), plain


@pytest.mark.parametrize(
    ("make", "fields", "error", "message"),
    [
        (SparseVLMSelector, {"tau": 1.5}, ValueError, r"tau must be in \[0, 1\], got 1.5"),
        (SparseVLMv2Selector, {"theta": "half"}, TypeError, r"theta must be a number in \[0, 1\]"),
        (HiPruneSelector, {"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\]"),
        (SpanPriorSelector, {"least": -1}, ValueError, r"least must be in \[0, 1\]"),
        (SpanJointSelector, {"nearest": 2}, ValueError, r"nearest must be in \[0, 1\]"),
        (
            MMTokSelector,
            {"text_temperature": 0.0},
            ValueError,
            "text_temperature must be a finite number above 0, got 0.0",
        ),
        (MMTokSelector, {"alpha": True}, TypeError, "alpha must be a number above 0, got True"),
        (ScopeSelector, {"alpha": float("inf")}, ValueError, "alpha must be a finite number above 0, got inf"),
        (VisionZipSelector, {"contextual": 64}, ValueError, "contextual must be at most 63, got 64"),
        (VisionZipSelector, {"of": 0}, ValueError, "of must be at least 1, got 0"),
    ],
)
def test_bad_fields(make, fields, error, message):
    with pytest.raises(error, match=message):
        make(**fields)


def test_the_rank_counts_by_the_fields_of_the_object():
    model, inputs = tiny_model(), make_inputs([("text", 3), ("image", 6, 8), ("text", 9)])
    options = {"min_keep": 3, "target_layers": [1], "rank_tolerance": 0.3, "rank_lambda": 1.0}
    reports = []
    for given in (
        {"selector": "sparsevlm", "tau": 0.9, "theta": 0.3},
        {"selector": SparseVLMSelector(tau=0.9, theta=0.3)},
        {"selector": "sparsevlm"},
    ):
        state = apply_sparsevlm(model, **options, **given)
        model.generate(**inputs, max_new_tokens=2)
        reports.append(state.report.samples)
    assert reports[0] == reports[1] != reports[2]
    with pytest.raises(ValueError, match=r"sets tau=0.3, but tau=0.9 was asked for"):
        apply_sparsevlm(model, **options, tau=0.9, selector=SparseVLMSelector(tau=0.3))
