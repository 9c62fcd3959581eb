"""The oracle's cases hold every combination that they are to hold."""

from __future__ import annotations

import itertools

import pytest
import test_needs
import test_oracle
import test_turns
import ways

from covering import covering_array, factor_groups


def combinations(cases, groups):
    return {(group, *(case[name] for name in group)) for case in cases for group in groups}


@pytest.mark.parametrize(
    ("factors", "together", "possible", "cases"),
    [
        (test_oracle.FACTORS, test_oracle.TOGETHER, ways.possible, test_oracle.CASES),
        (test_turns.FACTORS, test_turns.TOGETHER, test_turns.possible, test_turns.CASES),
        (test_needs.TOWER_FACTORS, (tuple(test_needs.TOWER_FACTORS)[:3],), lambda case: True, test_needs.TOWER_CASES),
    ],
    ids=["oracle", "turns", "tower"],
)
def test_every_combination_of_a_possible_case_occurs(factors, together, possible, cases):
    every = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    every = [case for case in every if possible(case)]
    groups = [*itertools.combinations(factors, 2), *together]
    wanted = combinations(every, groups)
    assert len(wanted) > 100
    assert combinations(cases, groups) == wanted
    assert all(case in every for case in cases)
    assert len(cases) < len(every) / 2


def test_no_way_and_no_cache_is_lost():
    asked = {(case["way"], case["cache"]) for case in test_oracle.CASES}
    crossed = {name: way for name, way in test_oracle.WAYS.items() if way.is_crossed}
    assert asked == {(name, cache) for name, way in crossed.items() for cache in way.caches}
    every = itertools.product(test_oracle.PROMPTS, test_oracle.VARIANTS, test_oracle.ATTENTIONS)
    assert {(case["prompt"], case["variant"], case["attention"]) for case in test_oracle.CASES} == set(every)


def test_four_cases_hold_all_pairs_of_three_factors_of_two_values():
    factors = {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    found = covering_array(factors, factor_groups(factors), lambda case: True)
    assert [tuple(case.values()) for case in found] == [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    assert factor_groups("abc", 2, "ab") == [("a", "b"), ("a", "c"), ("b", "c")]
    together = covering_array(factors, factor_groups(factors, 2, "abc"), lambda case: True)
    assert len(together) == 8


def test_what_cannot_be_does_not_occur():
    factors = {"a": (0, 1), "b": (0, 1, 2)}
    found = covering_array(factors, factor_groups(factors), lambda case: case["a"] + case["b"] < 3)
    assert [tuple(case.values()) for case in found] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"no case has b = 2: see what is possible"):
        covering_array(factors, factor_groups(factors), lambda case: case["b"] < 2)
