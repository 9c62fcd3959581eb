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
    places = {name: {value: place for place, value in enumerate(values)} for name, values in factors.items()}
    columns = {name: np.array([places[name][case[name]] for case in cases]) for name in factors}
    numbers, n_numbers = [], 0
    for group in groups:
        sizes = [len(factors[name]) for name in group]
        _, own = np.unique(np.ravel_multi_index([columns[name] for name in group], sizes), return_inverse=True)
        numbers.append(own + n_numbers)
        n_numbers += int(own.max()) + 1
    missing, chosen = np.ones(n_numbers, dtype=bool), []
    n_missing = np.full(len(cases), len(numbers))  # of each case
    while missing.any():
        best = int(n_missing.argmax())
        chosen.append(cases[best])
        for own in numbers:
            if missing[own[best]]:
                missing[own[best]] = False
                n_missing -= own == own[best]
    return chosen


def parametrize_pairs(
    possible: Callable[[dict[str, Any]], bool] = lambda case: True, **factors: Sequence[Any]
) -> pytest.MarkDecorator:
    """As ``pytest.mark.parametrize`` of every factor, for cases in which all pairs of values occur, not the product.

    Values have to be hashable: options are given by their names.
    """
    cases = covering_array(factors, factor_groups(factors), possible)
    return pytest.mark.parametrize(tuple(factors), [tuple(case.values()) for case in cases], ids=str)
