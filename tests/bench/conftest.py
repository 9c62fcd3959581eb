"""Estimates of runs on tiny models are by a few calls of transformers alone, which is quicker."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def transformers_alone_is_probed(monkeypatch):
    monkeypatch.setattr("sparsevlm.bench.run.LONGEST_OF_ALL", 0.0)
