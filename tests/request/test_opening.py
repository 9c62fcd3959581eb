"""Budgets of a request and the layers they are for, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from made_requests import First, make_request, make_sample
from sparsevlm.config import SparseVLMConfig
from sparsevlm.models import Decoder
from sparsevlm.request.opening import per_sample_budgets, plan_samples
from sparsevlm.request.options import check_budget, check_needs, resolved_target_layers
from sparsevlm.selection.context import SelectorTraits


def adapter(n_layers=8, readable=()):
    text_model, vision = SimpleNamespace(config=SimpleNamespace()), SimpleNamespace(readable=readable, unreadable="")
    decoder = Decoder(text_model, range(n_layers), (), embed=None, norm=None, rotary=None, head=None)
    return SimpleNamespace(n_layers=n_layers, name="Tiny", decoder=decoder, vision=vision)


def counts_of(*samples, n_layers=8, target_layers=(1, 3), **options):
    request = make_request(*samples, target_layers=target_layers, **options)
    plan_samples(adapter(n_layers), request)
    return [None if sample.plan is None else sample.plan.counts for sample in request.samples]


def sample_of(n, n_left=None):
    return make_sample(range(n), [n], alive=None if n_left is None else list(range(n_left)))


def test_a_budget_is_that_of_each_sample():
    # 100 tokens: layers 0 and 1 see all, which leaves 0.5 · 8 · 100 - 200 = 200 for two layers and four.
    # At the ratio 0.5, 2 · 50 + 4 · 25 = 200.
    assert counts_of(sample_of(100), sample_of(40), keep=0.5) == [(50, 25), (20, 10)]
    assert counts_of(sample_of(100), keep=50) == [(50, 25)]
    assert counts_of(sample_of(100), keep=0.5, schedule="single") == [(33, 33)]  # 200 / 6
    assert counts_of(sample_of(100), sample_of(40), keep=[0.5, 1.0]) == [(50, 25), (40, 40)]
    assert counts_of(sample_of(100), keep=None) == [None]
    assert counts_of(sample_of(0), sample_of(100), keep=0.5) == [(0, 0), (50, 25)]


def test_a_fraction_is_of_all_tokens_where_some_are_gone_already():
    # 80 of 100 are left: half of 100 is 50 a layer, and 0.5 · 8 · 100 - 2 · 80 = 240 for the other six layers.
    (plan,) = counts_of(sample_of(100, 80), keep=0.5, schedule="single")
    assert plan == (40, 40)
    few = sample_of(100, 40)  # fewer than the budget
    assert counts_of(few, keep=0.5) == [(40, 40)]
    assert few.plan.budget == 40
    (plan,) = counts_of(sample_of(100, 80), keep=50, schedule="single")
    assert plan == (40, 40)


def test_a_schedule_is_of_all_tokens_and_no_more_than_are_left():
    assert counts_of(sample_of(100), keep=None, schedule=[0.5, 0.2]) == [(50, 20)]
    assert counts_of(sample_of(100, 40), keep=None, schedule=[0.5, 0.2]) == [(40, 20)]
    assert counts_of(sample_of(100, 40), keep=None, schedule=[60, 7]) == [(40, 7)]


def test_a_budget_that_cannot_hold_is_refused_where_it_has_to():
    # The least is (2 · 100 + 6 · 2) / 8.
    assert counts_of(sample_of(100), keep=20) == [(2, 2)]
    refused = (
        r"less than the least possible: 26.5 used, as layers 0..1 see .* min_keep=2 .* \(strict=True refuses this\)"
    )
    with pytest.raises(ValueError, match=refused):
        counts_of(sample_of(100), keep=20, strict=True)
    assert counts_of(sample_of(100), keep=0.5, strict=True) == [(50, 25)]


def test_a_list_of_budgets_is_repeated_for_copies_of_its_samples():
    assert per_sample_budgets(0.5, 3, 1) == [0.5] * 3
    assert per_sample_budgets((0.5, 7), 2, 1) == [0.5, 7]
    assert per_sample_budgets((0.5, 7), 6, 3) == [0.5] * 3 + [7] * 3
    for batch, copies in ((6, 1), (6, 2), (3, 1), (1, 1), (2, 2)):
        with pytest.raises(ValueError, match=rf"keep holds 2 budgets for a batch of {batch // copies} samples"):
            per_sample_budgets((0.5, 7), batch, copies)


class Before(First):
    placement = "before_decoder"


class Everywhere(First):
    placement = "both"


def layers(selector=First, n_layers=8, **options):
    config = SparseVLMConfig(**{"keep": 0.5, **options})
    return resolved_target_layers(adapter(n_layers), config, SelectorTraits.of(selector()))


def test_target_layers_are_every_fourth_or_those_given():
    assert layers(n_layers=28) == (2, 6, 10, 14, 18, 22, 26)
    assert layers(n_layers=27) == (2, 6, 10, 14, 18, 22)
    assert layers(n_layers=4) == (2,)
    assert layers(target_layers=[0, 6]) == (0, 6)
    assert layers(Everywhere) == (-1, 2, 6)
    assert layers(Everywhere, target_layers=[5]) == (-1, 5)
    assert layers(Before) == (-1,)
    assert layers(Before, keep=None, schedule=[0.5]) == (-1,)


@pytest.mark.parametrize(
    ("selector", "options", "message"),
    [
        (First, {"n_layers": 3}, r"has 3 decoder layers, too few for the default target layers .* in 0..1"),
        (First, {"target_layers": [1, 7]}, r"target_layers \[7\] are out of range: Tiny has 8 .* after layers 0..6"),
        (Before, {"target_layers": [1]}, "selector 'Before' runs before the decoder: leave target_layers unset"),
        (Before, {"keep": None}, "selector 'Before' runs before the decoder, where no rank is known: set keep"),
        (Everywhere, {"keep": None, "schedule": "single"}, "selector 'Everywhere' runs before the decoder, where no"),
    ],
)
def test_layers_that_cannot_be_are_refused(selector, options, message):
    with pytest.raises(ValueError, match=message):
        layers(selector, **options)


def test_what_the_vision_tower_does_not_have_is_refused():
    class Reads(First):
        needs = ("vision_keys", "vision_attention", "features")

    traits = SelectorTraits.of(Reads())
    with pytest.raises(NotImplementedError, match="'Reads' needs vision_attention, vision_keys, which is read in"):
        check_needs(adapter(), traits)
    check_needs(adapter(readable=((0, None),)), traits)
    check_needs(adapter(), SelectorTraits.of(First()))


def test_budgets_that_no_image_can_meet_are_refused():
    def check(n_vis=None, target_layers=(1, 3), **options):
        check_budget(adapter(), SparseVLMConfig(n_vis=n_vis, **options), target_layers)

    for options in ({"keep": 0.25}, {"keep": 1.0}, {"keep": 20}, {"keep": 25, "n_vis": 100}, {"keep": None}):
        check(**options)
    check(keep=0.01, target_layers=(-1,))
    check(keep=None, schedule=[5, 4])
    for options in ({"keep": 0.24}, {"keep": [0.5, 0.2]}, {"keep": 24, "n_vis": 100}):
        with pytest.raises(ValueError, match=r"layers 0..1 see every visual token, so the average is at least 0.250"):
            check(**options)
    for schedule in ([5], [5, 4, 3]):
        with pytest.raises(ValueError, match=rf"schedule has {len(schedule)} counts for 2 target layers \(1, 3\)"):
            check(keep=None, schedule=schedule)
