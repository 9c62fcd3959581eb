"""Estimate of the time that a benchmark takes, from roofline bounds and what is usual above them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..models import ModelAdapter
from .cases import AnyCase, Case, MixedCase, PictureCase
from .mixed import DENSE_SECONDS
from .providers import Provider
from .roofline import Roofline, roofline_bounds
from .rounds import MIN_TIMED, Settings

# Seconds of a call: so many times its bound, and so many beside.
_TRANSFORMERS, _OURS = (5.0, 0.05), (2.0, 0.02)
_CAPTURES, _COMPILATION = 4.0, 40.0  # seconds of a first call
_LADDER = 20.0  # seconds of this library's warm-up
_CHECKED = 8  # calls by which answers are compared


def estimated_seconds(
    case: AnyCase, providers: Sequence[Provider], settings: Settings, adapter: ModelAdapter, roofline: Roofline
) -> float:
    """Seconds that a case takes, roughly.

    Parameters
    ----------
    case : Case, PictureCase or MixedCase
    providers : sequence of Provider
    settings : Settings
    adapter : ModelAdapter
    roofline : Roofline
    """
    requests = case.requests(settings.seed) if isinstance(case, MixedCase) else [_request(case)]
    dense = [
        roofline_bounds(adapter, one, [one.n_visual] * adapter.n_layers, roofline)["total"] / 1e3 for one in requests
    ]
    total = 0.0
    for provider in providers:
        if not provider.supports(case):
            continue
        factor, beside = _TRANSFORMERS if provider.state is None else _OURS
        calls = [factor * seconds + beside for seconds in dense]
        first = _COMPILATION if provider.compiles else _CAPTURES if provider.state is not None else 0.0
        if isinstance(case, MixedCase):
            total += min(sum(calls), DENSE_SECONDS) if provider.state is None else _LADDER + sum(calls)
            continue
        timed = min(settings.iterations * calls[0], max(settings.seconds, MIN_TIMED * calls[0]))
        total += first + timed + settings.warmup * calls[0]
    return total + _CHECKED * (_TRANSFORMERS[0] * min(dense) + _TRANSFORMERS[1])


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
        self._estimates, self._done, self._begin = list(estimates), 0, time.monotonic()

    def next(self) -> str:
        """Time that is left, in words; the case before is done."""
        before, left = sum(self._estimates[: self._done]), sum(self._estimates[self._done :])
        if before:
            left *= (time.monotonic() - self._begin) / before
        self._done += 1
        return in_words(left)


def in_words(seconds: float) -> str:
    """About how long, such as ``about 7 min``."""
    return f"about {max(1, round(seconds / 60))} min" if seconds > 50 else f"about {max(1, round(seconds))} s"
