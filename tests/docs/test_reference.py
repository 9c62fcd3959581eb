"""The lists of names on the pages of the reference are those of the package."""

from __future__ import annotations

import re

import pytest
from documents import ROOT, name_of, read

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))


@pytest.fixture
def lists():
    from benchmark import reference_lists

    return reference_lists


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_list_is_what_the_docstrings_say(page, lists):
    assert lists.with_list(read(page)) == read(page), "run python -m benchmark.reference_lists"
    table, directives = read(page).split("<!-- end of names -->")
    named = set(re.findall(r"^\| \[`([\w.]+)`\]", table, re.MULTILINE))
    assert named == set(re.findall(r"^::: (.*)$", directives, re.MULTILINE))
    assert not re.search(r"\| *\|$", re.sub(r"^\| (?:name|option) .*$", "", table, flags=re.MULTILINE), re.MULTILINE)


def test_a_name_that_is_new_or_gone_is_seen(lists):
    page = "<!-- names -->\n<!-- end of names -->\n\n::: sparsevlm.report_total.Cost\n"
    made = lists.with_list(page)
    assert "| `Cost.ratio` | Sparse over dense; 1.0 where the dense figure is zero |" in made
    assert lists.with_list(made) == made
    other = made.replace("::: sparsevlm.report_total.Cost", "::: sparsevlm.remove_sparsevlm")
    assert lists.with_list(other) != other
    assert "Cost" not in lists.with_list(other)
    with pytest.raises(AttributeError, match="gone"):
        lists.with_list(page.replace("Cost", "gone"))


def test_members_are_those_that_the_directive_names(lists):
    page = "::: sparsevlm.inputs.ImageTextProcessor\n    options:\n      members: [__call__, save_pretrained]\n"
    _, _, *rows, _, _ = lists.list_of(page)
    names = [re.findall(r"`([\w.]+)`", row)[0] for row in rows]
    own = "ImageTextProcessor"
    assert names == [f"sparsevlm.inputs.{own}", f"{own}.__call__", f"{own}.save_pretrained"]


def test_every_option_is_listed_with_its_default(lists):
    from sparsevlm import SparseVLMConfig

    rows = lists.list_of("::: sparsevlm.SparseVLMConfig\n")
    shown = {name: default for row in rows for name, default in re.findall(r"^\| `(\w+)` \| .* \| `(.*)` \| ", row)}
    assert shown == {name: repr(value) for name, value in vars(SparseVLMConfig()).items()}
