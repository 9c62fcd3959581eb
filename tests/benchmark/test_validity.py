"""A ranking of ours beside published ones."""

import pytest
from scipy.stats import kendalltau


@pytest.fixture
def validity():
    from benchmark import validity

    return validity


def published(**retained):
    shared = {"source": "S", "url": "", "read_in": "the source", "checkpoint": "C", "n_visual": "100", "kept": "25"}
    return [{**shared, "selector": name, "retained": str(value)} for name, value in retained.items()]


def ours(keep="0.25", **retained):
    return {(name, keep): value for name, value in retained.items()}


def test_tau_is_that_of_scipy_where_nothing_is_tied(validity):
    one, other = {"a": 90, "b": 80, "c": 70, "d": 95, "e": 60}, {"a": 50, "b": 70, "c": 30, "d": 80, "e": 40}
    (found,) = validity.comparisons(published(**one), ours(**other))
    right = kendalltau(list(one.values()), [other[name] for name in one]).statistic
    assert validity.kendall([found]) == pytest.approx(right)
    assert sum(found.agreement()) == 10


def test_ties_are_left_out(validity):
    (found,) = validity.comparisons(published(a=90, b=90, c=80), ours(a=2, b=1, c=3))
    assert found.agreement() == (0, 2)
    assert validity.kendall([found]) == -1


def test_pairs_are_of_one_table_and_budget(validity):
    """Two tables that contradict each other are not joined to one ranking."""
    second = [{**row, "source": "T"} for row in published(a=10, b=20)]
    third = [{**row, "kept": "10"} for row in published(a=10, b=20)]
    found = validity.comparisons(published(a=90, b=80) + second + third, ours(a=2, b=1))
    assert [one.agreement() for one in found] == [(1, 0), (0, 1)]
    assert validity.kendall(found) == 0


def test_the_nearest_budget_is_taken(validity):
    rows = ours("0.37", a=5, b=4) | ours("0.25", a=1, b=2) | ours("adaptive", a=7, b=7)
    (found,) = validity.comparisons([{**row, "kept": "33"} for row in published(a=90, b=80)], rows)
    assert (found.keep, found.ours) == ("0.37", {"a": 5, "b": 4})


def test_selectors_that_only_one_side_has_are_left_out(validity):
    (found,) = validity.comparisons(published(a=90, b=80), ours(b=1, c=2, dense=100))
    assert set(found.published) == set(found.ours) == {"b"}


def test_pairs_by_where_their_selectors_choose(validity):
    """Two of them before the decoder, two inside, of which one pair of each kind is ranked the other way round."""
    of_others, of_ours = (
        {"scope": 90, "divprune": 80, "fastv": 70, "span": 60},
        {"scope": 5, "divprune": 6, "fastv": 5.5},
    )
    (found,) = validity.comparisons(published(**of_others), ours(**of_ours, span=7))
    assert [found.agreement(n) for n in range(3)] == [(0, 1), (1, 3), (0, 1)]
    lines = validity.agreement_lines([found])
    assert "| pairs of which both choose inside the decoder | 0 | 1 | -1.00 |" in lines
    assert "| pairs of which one before it, one inside | 1 | 3 | -0.50 |" in lines
    assert "| **all** | 1 | 5 | -0.67 |" in lines


def test_several_settings_of_a_selector_are_refused(validity, monkeypatch):
    rows = {("grid", "0.25", "default", options, ""): {} for options in ("", "min_keep=8")}
    monkeypatch.setattr(validity, "of_suites", lambda _: rows)
    monkeypatch.setattr(validity, "mean_retained", lambda _: 50.0)
    with pytest.raises(ValueError, match="several settings of one selector at one budget: narrow the filter"):
        validity.validity_table([])


def test_published_rows_say_where_they_stand(validity):
    from sparsevlm.selection.selectors import SELECTORS

    rows = validity.read_published()
    assert {row["selector"] for row in rows} <= set(SELECTORS)
    for row in rows:
        assert row["source"]
        assert row["checkpoint"]
        assert 50 < float(row["retained"]) < 100
        assert float(row["kept"]) < float(row["n_visual"])


def test_no_rows_are_an_error(validity):
    with pytest.raises(ValueError, match="its filter finds \\[\\]"):
        validity.validity_table([])
