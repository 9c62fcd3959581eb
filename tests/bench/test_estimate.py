"""Estimates before and during a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparsevlm.bench import estimate
from sparsevlm.bench.cases import Case, MixedCase, PictureCase, named_cases
from sparsevlm.bench.estimate import Pace, estimated_seconds, expected_calls, in_words
from sparsevlm.bench.probe import Probe
from sparsevlm.bench.providers import make_providers
from sparsevlm.bench.roofline import Roofline
from sparsevlm.bench.rounds import Measurement, Settings
from sparsevlm.bench.run import Run
from sparsevlm.bench.shapes import random_model
from sparsevlm.models import adapter_for

PEAKS = Roofline(1e12, 1e11)


def test_more_takes_longer():
    model = random_model("tiny", "cpu", torch.float32, "sdpa", layers=6)
    providers, adapter = make_providers(model, (0.5,), static=True), adapter_for(model)

    def seconds(case, providers=providers, **changes):
        expected = expected_calls(case, providers, 0, adapter, PEAKS, {})
        return estimated_seconds(case, expected, Settings(**changes))

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


def test_time_that_is_left_within_a_case(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(estimate.time, "monotonic", lambda: clock[0])
    pace = Pace([60.0, 120.0])
    pace.next()
    clock[0] = 30.0
    assert pace.within(30.0) == "about 2 min", "as expected"
    assert pace.within(210.0) == "about 12 min", "the case takes four times what was expected: 210 s and 480 s"
    clock[0] = 240.0
    assert pace.next() == "about 8 min"
    clock[0] = 1000.0
    assert pace.within(20.0) == "about 20 s", "the last case takes longer than it was thought to"


def test_calls_that_are_left():
    settings = Settings(seconds=2.0, iterations=10, warmup=3)
    assert Measurement().seconds_left(settings, 0.1) == pytest.approx(13 * 0.1), "three to warm up, ten to time"
    assert Measurement().seconds_left(settings, 1.0) == pytest.approx(4.0), "of slow ones one and three"
    assert Measurement(min_warmup=3).seconds_left(settings, 1.0) == pytest.approx(6.0), "the engine records first"
    assert Measurement(note="void").seconds_left(settings, 1.0) == 0.0
    measured = Measurement(min_warmup=3)
    for seconds in (4.0, 0.1, 0.1):
        measured.warmup(seconds)
    assert measured.seconds_left(settings, 1.0) == pytest.approx(10 * 0.1), "by its own calls, not by the first"
    for _ in range(4):
        measured.add({}, 0.5)
    assert measured.seconds_left(settings, 1.0) == 0.0


def test_on_a_cpu_the_estimate_is_of_calls_that_were_timed():
    """Its peaks are the same where other processes make every call slower, and nothing is recorded there."""
    model = random_model("tiny", "cpu", torch.float32, "sdpa", layers=6)
    providers, adapter = make_providers(model, (0.5,), static=False), adapter_for(model)
    bounds = {"first_token": 1.0, "decode_per_token": 1.0, "total": 3.0}

    def seconds(case, first_token, per_token=0.0, **others):
        probes = {
            one: Probe(others.get(one.name.replace("-", "_"), first_token), per_token, 0.0, bounds) for one in providers
        }
        expected = expected_calls(case, providers, 0, adapter, PEAKS, probes)
        return estimated_seconds(case, expected, Settings(seconds=2.0))

    assert probe_seconds(2.0, 2) == pytest.approx(0.2 + 0.05)
    assert probe_seconds(0.5, 2) == pytest.approx(0.05 + 0.05), "a step takes no less than that of the small request"
    assert seconds(Case(256, 1, 1), 1e4) == pytest.approx(10 * seconds(Case(256, 1, 1), 1e3), rel=0.3)
    assert seconds(Case(256, 1, 8), 1e3, 1e3) > seconds(Case(256, 1, 8), 1e3)
    assert seconds(Case(256, 1, 1), 0.001) < 1.0, "no time for captures"
    assert seconds(Case(256, 1, 1), 1e3, ours_default=1e4) > 1.5 * seconds(Case(256, 1, 1), 1e3), "each by its own"


def probe_seconds(times_larger, new_tokens):
    probe = Probe(100.0, 50.0, 0.0, {"first_token": 3.0, "decode_per_token": 2.0})
    bounds = {"first_token": 3.0 * times_larger, "decode_per_token": 1.0}
    return probe.seconds(bounds, new_tokens)


@pytest.mark.parametrize("names", [("v36-b1-n4", "v64-b2-n1"), ("picture448-b1-n1",), ("mixed24",)])
def test_the_smallest_request_is_timed(names, monkeypatch):
    from sparsevlm.bench import run as run_module

    timed, measure_probe = [], run_module.measure_probe

    def measure(*given):
        timed.append(given)
        return measure_probe(*given) if len(timed) == 1 else Probe(1.0, 1.0, 0.0, given[3])

    monkeypatch.setattr(run_module, "measure_probe", measure)
    monkeypatch.setattr(run_module, "LONGEST_OF_ALL", 1e9)
    bench = Run(random_model("tiny", "cpu", torch.float32, "sdpa", layers=6), Settings((0.6,), selectors=()), {})
    cases = named_cases(names, full=False)
    bench.leave_out(cases)
    estimates, with_one = bench.estimate(cases)
    assert len(estimates) == len(cases)
    assert all(seconds > 0.0 for seconds in estimates)
    assert with_one == [], "torch has one thread"
    assert {given[0].name for given in timed} == {one.name for one in bench.providers if one.supports(cases[0])}
    (request,) = {given[1] for given in timed}
    sizes = [one for case in cases for one in (case.requests(0) if isinstance(case, MixedCase) else [case])]
    assert request.n_visual in sorted(one.n_visual for one in sizes)[:2], "or the next, of a shorter text"
    assert request.n_visual < max(one.n_visual for one in sizes) or len(sizes) == 1
    assert request.new_tokens == (1 if names == ("picture448-b1-n1",) else 3)
    timed.clear()
    monkeypatch.setattr(run_module, "LONGEST_OF_ALL", 0.0)
    assert all(seconds > 0.0 for seconds in bench.estimate(cases)[0])
    assert [given[0].name for given in timed] == ["hf-dense"], "of calls that take a while only one provider's are made"
    monkeypatch.setattr(run_module, "LONGEST", 0.0)
    assert all(seconds > 0.0 for seconds in bench.estimate(cases)[0])
    assert len(timed) == 1, "and of longer ones none"


def test_a_picture_is_timed_where_no_images_are_made_in_code(monkeypatch):
    from sparsevlm.bench import run as run_module

    drawn = []
    first_request = run_module.first_request
    monkeypatch.setattr(run_module, "first_request", lambda *given: drawn.append(given[0]) or first_request(*given))
    monkeypatch.setattr(run_module, "images_of", lambda adapter, request: ())
    bench = Run(random_model("tiny", "cpu", torch.float32, "sdpa", layers=6), Settings((0.6,), selectors=()), {})
    assert bench.estimate([PictureCase(448)])[0][0] > 0.0
    assert drawn == [PictureCase(448)]


def test_one_thread_is_told_where_it_is_faster(monkeypatch):
    from sparsevlm.bench import run as run_module

    threads, said, slow = [], [], [1000.0]

    def measure(provider, request, inputs, bounds):
        threads.append(torch.get_num_threads())
        return Probe(100.0 if threads[-1] == 1 else slow[0], 0.0, 0.0, bounds)

    def stop(seconds):
        raise InterruptedError

    monkeypatch.setattr(run_module, "measure_probe", measure)
    model = random_model("tiny", "cpu", torch.float32, "sdpa", layers=6)
    torch.set_num_threads(2)
    try:
        for seconds in (1000.0, 60.0):
            slow[0] = seconds
            with pytest.raises(InterruptedError):
                run_module.run(model, [Case(36, 1, 1)], Settings((0.6,)), {}, say=said.append, confirm=stop)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert threads == [2, 1, 2, 1]
    told = [line for line in said if "providers: about" in line]
    assert told[0].endswith(" s with one thread (OMP_NUM_THREADS=1)")
    assert "thread" not in told[1]


def test_calls_with_one_thread_are_those_of_all_providers_scaled():
    dense, single = Probe(200.0, 10.0, 0.0, {}), Probe(100.0, 2.0, 0.0, {})
    ours = Probe(80.0, 20.0, 3.0, {})
    assert ours.scaled(single, dense) == Probe(40.0, 4.0, 3.0, {})
    assert (
        ours.scaled(dataclasses.replace(single, per_token=0.0), dataclasses.replace(dense, per_token=0.0)).per_token
        == 20.0
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "about 1 s"), (40.4, "about 40 s"), (75, "about 1 min"), (600, "about 10 min")]
)
def test_words(seconds, words):
    assert in_words(seconds) == words
