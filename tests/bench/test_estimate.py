"""Estimates before and during a run."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.bench import estimate
from sparsevlm.bench.cases import Case, MixedCase, PictureCase
from sparsevlm.bench.estimate import Pace, estimated_seconds, in_words
from sparsevlm.bench.providers import make_providers
from sparsevlm.bench.roofline import Roofline
from sparsevlm.bench.rounds import Settings
from sparsevlm.bench.shapes import random_model
from sparsevlm.models import adapter_for

PEAKS = Roofline(1e12, 1e11)


def test_more_takes_longer():
    model = random_model("tiny", "cpu", torch.float32, "sdpa", layers=6)
    providers, adapter = make_providers(model, (0.5,), static=True), adapter_for(model)

    def seconds(case, providers=providers, **changes):
        return estimated_seconds(case, providers, Settings(**changes), adapter, PEAKS)

    assert seconds(Case(256, 1, 64)) > seconds(Case(256, 1, 1)) > 0
    assert seconds(Case(256, 1, 1), iterations=1) < seconds(Case(256, 1, 1))
    assert seconds(Case(256, 1, 1)) > seconds(Case(256, 1, 1), providers[:3])
    assert seconds(MixedCase(200)) > seconds(MixedCase(24)) > 0
    assert seconds(PictureCase(448)) == seconds(Case(256, 1, 1)), "of the same providers"
    compiled = [provider for provider in providers if provider.compiles]
    assert seconds(Case(256, 1, 64), compiled) > 30
    assert seconds(Case(256, 1, 1), compiled) < 30, "is not measured there"


def test_time_that_is_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: clock[0])
    pace = Pace([60.0, 120.0, 300.0])
    assert pace.next() == "about 8 min"
    clock[0] = 30.0  # half of what was expected
    assert pace.next() == "about 4 min"
    clock[0] = 90.0
    assert pace.next() == "about 2 min"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "about 1 s"), (40.4, "about 40 s"), (75, "about 1 min"), (600, "about 10 min")]
)
def test_words(seconds, words):
    assert in_words(seconds) == words
