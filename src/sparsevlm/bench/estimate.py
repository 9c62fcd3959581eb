"""Estimate of the time that a benchmark takes: from roofline bounds, or from calls that were timed before."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from ..models import ModelAdapter
from .cases import AnyCase, Case, MixedCase, PictureCase
from .mixed import DENSE_SECONDS
from .probe import Probe
from .providers import Provider
from .roofline import Roofline, dense_bounds
from .rounds import Measurement, Settings

# Seconds of a call on a GPU: so many times its bound, and so many beside.
_TRANSFORMERS, _OURS = (5.0, 0.05), (2.0, 0.02)
_CAPTURES, _COMPILATION = 4.0, 40.0  # seconds of a first call
_LADDER = 20.0  # seconds of this library's warm-up
ONE_IS_FASTER = 0.7  # of the estimate, below which that with one thread is told
_CHECKED = 8  # calls by which answers are compared


def estimated_seconds(
    case: AnyCase, providers: Sequence[Provider], settings: Settings, adapter: ModelAdapter, roofline: Roofline,
    probe: Probe | None = None,
) -> float:  # fmt: skip
    """Seconds that a case takes, roughly.

    Parameters
    ----------
    case : Case, PictureCase or MixedCase
    providers : sequence of Provider
    settings : Settings
    adapter : ModelAdapter
    roofline : Roofline
    probe : Probe, optional
        Times of a call: without one they are so many times the roofline bound as is usual on a GPU.
    """
    requests = case.requests(settings.seed) if isinstance(case, MixedCase) else [_request(case)]
    bounds = [dense_bounds(adapter, one, roofline) for one in requests]
    records = adapter.model.device.type == "cuda"  # nothing is captured elsewhere, and no ladder run
    total = 0.0
    for provider in providers:
        if not provider.supports(case):
            continue
        calls = [
            _call_seconds(bound, one.new_tokens, probe, is_ours=provider.state is not None)
            for bound, one in zip(bounds, requests, strict=True)
        ]
        if isinstance(case, MixedCase):
            ahead = _LADDER if records else 0.0
            total += min(sum(calls), DENSE_SECONDS) if provider.state is None else ahead + sum(calls)
            continue
        captures = _CAPTURES if provider.state is not None and records else 0.0
        first = calls[0] + (_COMPILATION if provider.compiles else captures)
        total += first + Measurement.of(provider).seconds_left(settings, calls[0])
    checked = min(_call_seconds(bound, 1, probe, is_ours=False) for bound in bounds)
    return total + _CHECKED * checked


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
        self._factor, self._case_begin = 1.0, self._begin

    def next(self) -> str:
        """Time that is left, in words; the case before is done, and another begins."""
        self._case_begin = time.monotonic()
        if before := sum(self._estimates[: self._n_begun]):
            self._factor = (self._case_begin - self._begin) / before
        left = self._factor * sum(self._estimates[self._n_begun :])
        self._n_begun += 1
        return in_words(left)

    def within(self, of_case: float | None) -> str:
        """Time that is left, in words, within a case; empty where it is not known.

        Parameters
        ----------
        of_case : float, optional
            Seconds that the case still takes, by its own calls; without them the estimate is all that is known, and
            nothing once it is used up.
        """
        begun, later = self._estimates[: self._n_begun], sum(self._estimates[self._n_begun :])
        now = time.monotonic()
        if of_case is not None:
            factor = (now - self._begin + of_case) / sum(begun)
            return in_words(of_case + factor * later)
        of_case = self._factor * begun[-1] - (now - self._case_begin)
        return in_words(of_case + self._factor * later) if of_case > 0.0 else ""


def in_words(seconds: float) -> str:
    """About how long, such as ``about 7 min``."""
    return f"about {max(1, round(seconds / 60))} min" if seconds > 50 else f"about {max(1, round(seconds))} s"
