"""Covering arrays: few cases that hold every combination of values of some factors together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest


def factor_groups(factors: Iterable[str], strength: int = 2, *together: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of factors whose combinations count: all of ``strength`` factors, and those named in ``together``."""
    named = [tuple(group) for group in together]
    pairs = itertools.combinations(factors, strength)
    return [*named, *(group for group in pairs if not any(set(group) <= set(more) for more in named))]


def covering_array(
    factors: Mapping[str, Sequence[Any]], groups: Iterable[Iterable[str]], possible: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Cases in which every combination that a possible case holds of each group of factors occurs.

    Greedy: the next case is the first of those with the most combinations that no earlier one has; the same in every
    run. Every possible case is looked at, so a table may have some ten thousands of them.

    Parameters
    ----------
    factors : mapping of str to sequence
        Values of each factor.
    groups : iterable of iterable of str
        From :func:`factor_groups`.
    possible : callable
        Whether a case can be.

    Returns
    -------
    list of dict

    Raises
    ------
    ValueError
        If a value of a factor is in no possible case.
    """
    cases = [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]
    cases = [case for case in cases if possible(case)]
    for name, values in factors.items():
        if lost := set(values) - {case[name] for case in cases}:
            raise ValueError(f"no case has {name} = {', '.join(sorted(map(str, lost)))}: see what is possible.")
    numbers: dict[tuple[Any, ...], int] = {}
    groups = [tuple(group) for group in groups]
    combinations = np.array(
        [
            [numbers.setdefault((group, *(case[name] for name in group)), len(numbers)) for group in groups]
            for case in cases
        ]
    )
    missing = np.ones(len(numbers), dtype=bool)
    chosen = []
    while missing.any():
        best = int(missing[combinations].sum(axis=1).argmax())
        missing[combinations[best]] = False
        chosen.append(cases[best])
    return chosen


def parametrize_pairs(
    possible: Callable[[dict[str, Any]], bool] = lambda case: True, **factors: Sequence[Any]
) -> pytest.MarkDecorator:
    """As ``pytest.mark.parametrize`` of every factor, for cases in which all pairs of values occur, not the product.

    Values have to be hashable: options are given by their names.
    """
    cases = covering_array(factors, factor_groups(factors), possible)
    return pytest.mark.parametrize(tuple(factors), [tuple(case.values()) for case in cases], ids=str)
