"""Versions of transformers."""

from __future__ import annotations

import pytest
import transformers

from sparsevlm import apply_sparsevlm
from sparsevlm.compat import NEWEST, OLDEST, cache_of, check_transformers
from toys import tiny_model


@pytest.mark.parametrize("version", [OLDEST, "5.20.1", "5.24.0"])
def test_the_tested_range_is_taken_silently(version, caplog):
    check_transformers(version=version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["5.16.4", "5.25.0", "6.0.0", "5.25.0.dev0", "4.57.0"])
def test_other_versions_are_refused_with_the_remedy(version, caplog):
    with pytest.raises(
        ImportError, match=rf'{version} is installed.*pip install "transformers>=5.17,<5.25".*allow_unt'
    ):
        check_transformers(version=version)
    check_transformers(True, version)
    assert version in caplog.text


def test_a_newer_patch_is_warned_about_once(caplog):
    for _ in range(2):
        check_transformers(version="5.24.7")
    assert caplog.text.count("patch 5.24.7") == 1


def test_the_installed_version_is_one_of_the_ends():
    assert transformers.__version__ in (OLDEST, NEWEST)


def test_apply_checks(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    check_transformers.cache_clear()
    with pytest.raises(ImportError, match=r"5\.99\.0"):
        apply_sparsevlm(tiny_model())
    assert apply_sparsevlm(tiny_model(), allow_untested=True).attached
    monkeypatch.undo()
    check_transformers.cache_clear()


def test_the_cache_has_two_names():
    assert cache_of({"cache": 1}) == cache_of({"past_key_values": 1}) == 1
    assert cache_of({"cache": None, "past_key_values": 2}) == 2
    assert cache_of({}) is None
