"""Estimate of the time that a benchmark takes: from roofline bounds, or from calls that were timed before."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

from ..models import ModelAdapter
from .cases import AnyCase, Case, MixedCase, PictureCase
from .mixed import seconds_of_requests
from .probe import Probe
from .providers import Provider
from .roofline import Roofline, dense_bounds
from .rounds import Measurement, Settings
from .steps import Expected

# Seconds of a call on a GPU: so many times its bound, and so many beside.
_TRANSFORMERS, _OURS = (5.0, 0.05), (2.0, 0.02)
_CAPTURES, _COMPILATION = 4.0, 40.0  # seconds of a first call
_LADDER = 20.0  # seconds of this library's warm-up
ONE_IS_FASTER = 0.7  # of the estimate, below which that with one thread is told
_CHECKED = 4  # calls by which answers are compared


def expected_calls(
    case: AnyCase, providers: Sequence[Provider], seed: int, adapter: ModelAdapter, roofline: Roofline,
    probes: Mapping[Provider, Probe],
) -> dict[Provider, Expected]:  # fmt: skip
    """Time that calls take, roughly, by the providers that a case is measured with.

    Parameters
    ----------
    case : Case, PictureCase or MixedCase
    providers : sequence of Provider
    seed : int
        By which requests of mixed shapes are drawn.
    adapter : ModelAdapter
    roofline : Roofline
    probes : mapping of Provider to Probe
        Times of calls: without one they are so many times the roofline bound as is usual on a GPU.
    """
    requests = case.requests(seed) if isinstance(case, MixedCase) else [_request(case)]
    bounds = [dense_bounds(adapter, one, roofline) for one in requests]
    records = adapter.model.device.type == "cuda"  # nothing is captured elsewhere, and no ladder run
    found = {}
    for provider in providers:
        if not provider.supports(case):
            continue
        probe = probes.get(provider)
        calls = [
            _call_seconds(bound, one.new_tokens, probe, is_ours=provider.state is not None)
            for bound, one in zip(bounds, requests, strict=True)
        ]
        ahead = 0.0 if probe is None else probe.beside
        if provider.compiles:
            ahead += _COMPILATION
        elif provider.state is not None and records:
            ahead += _LADDER if isinstance(case, MixedCase) else _CAPTURES
        found[provider] = Expected(ahead, statistics.fmean(calls))
    return found


def estimated_seconds(case: AnyCase, expected: Mapping[Provider, Expected], settings: Settings) -> float:
    """Seconds that a case takes, roughly.

    Parameters
    ----------
    case : Case, PictureCase or MixedCase
    expected : mapping of Provider to Expected
    settings : Settings
    """
    checked = _CHECKED * min((one.call for one in expected.values()), default=0.0)
    if isinstance(case, MixedCase):
        return checked + sum(
            one.ahead + seconds_of_requests(provider, case.n_requests * one.call) for provider, one in expected.items()
        )
    return checked + sum(
        one.ahead + one.call + Measurement.of(provider).seconds_left(settings, one.call)
        for provider, one in expected.items()
    )


def _call_seconds(bounds: Mapping[str, float], new_tokens: int, probe: Probe | None, *, is_ours: bool) -> float:
    if probe is not None:
        return probe.seconds(bounds, new_tokens)
    factor, beside = _OURS if is_ours else _TRANSFORMERS
    return factor * bounds["total"] / 1e3 + beside


def _request(case: Case | PictureCase) -> Case:
    return case.request if isinstance(case, PictureCase) else case


class Pace:
    """Time that is left, by estimates and by how long the cases that are done took.

    Parameters
    ----------
    estimates : sequence of float
        Seconds of each case, in order.
    """

    def __init__(self, estimates: Sequence[float]) -> None:
        self._estimates, self._n_begun, self._begin = list(estimates), 0, time.monotonic()

    def next(self) -> str:
        """Time that is left, in words; the case before is done, and another begins."""
        before, factor = sum(self._estimates[: self._n_begun]), 1.0
        if before:
            factor = (time.monotonic() - self._begin) / before
        left = factor * sum(self._estimates[self._n_begun :])
        self._n_begun += 1
        return in_words(left)

    def within(self, of_case: float) -> str:
        """Time that is left, in words, within a case.

        Parameters
        ----------
        of_case : float
            Seconds that the case still takes.
        """
        begun, later = self._estimates[: self._n_begun], sum(self._estimates[self._n_begun :])
        factor = (time.monotonic() - self._begin + of_case) / sum(begun)
        return in_words(of_case + factor * later)


def in_words(seconds: float) -> str:
    """About how long, such as ``about 7 min``."""
    return f"about {max(1, round(seconds / 60))} min" if seconds > 50 else f"about {max(1, round(seconds))} s"
