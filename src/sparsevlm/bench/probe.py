"""Times of a few calls of each provider before the estimate, on devices whose peaks do not tell how long a call takes.

The peaks of a CPU are the best of a few large products. A call is thousands of small operations, and where other
processes keep the cores busy each of them may wait for its last thread: the same call was seen to take thirty times as
long, at the same peaks.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from .cases import Case
from .providers import Inputs, Provider
from .timing import time_call

TOKENS = 3  # new ones, of requests that decode
LONGEST = 3.0  # seconds by its bound from which on no call is made: it would take a minute, of a run of many
LONGEST_OF_ALL = 1.0  # seconds of a dense call up to which calls of the other providers are made, too
_MOST_CALLS, _SECONDS = 3, 2.0  # no call begins after that


@dataclass(frozen=True)
class Probe:
    """Times of a small request, by which those of others are estimated.

    Attributes
    ----------
    first_token, per_token : float
        Milliseconds; ``per_token`` is 0 where the request does not decode.
    beside : float
        Seconds that the first call took beside those of the others.
    bounds : mapping of str to float
        Roofline bounds of the request, in milliseconds per phase.
    """

    first_token: float
    per_token: float
    beside: float
    bounds: Mapping[str, float]

    def seconds(self, bounds: Mapping[str, float], new_tokens: int) -> float:
        """Seconds of a call with other roofline bounds, which are in milliseconds per phase."""
        first = self.first_token * bounds["first_token"] / self.bounds["first_token"]
        further = 0.0
        if new_tokens > 1:
            further = self.per_token * max(1.0, bounds["decode_per_token"] / self.bounds["decode_per_token"])
        return (first + (new_tokens - 1) * further) / 1e3

    def scaled(self, other: Probe, by: Probe) -> Probe:
        """The same where calls differ as those of ``other`` do from those of ``by``."""
        per_token = self.per_token * other.per_token / by.per_token if by.per_token else self.per_token
        return replace(self, first_token=self.first_token * other.first_token / by.first_token, per_token=per_token)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure_probe(provider: Provider, request: Case, inputs: Inputs, bounds: Mapping[str, float]) -> Probe:
    """Time up to three calls behind a first one, and no further one after two seconds.

    Parameters
    ----------
    provider : Provider
    request : Case
    inputs : dict of Tensor
        Of the request.
    bounds : mapping of str to float
        Its roofline bounds, in milliseconds per phase.
    """
    first = time_call(provider, inputs, request.new_tokens)
    calls: list[dict[str, float]] = []
    begin = time.monotonic()
    while not calls or (len(calls) < _MOST_CALLS and time.monotonic() - begin < _SECONDS):
        calls.append(time_call(provider, inputs, request.new_tokens))
    first_token, per_token, total = (
        statistics.median(call.get(phase, 0.0) for call in calls)
        for phase in ("first_token", "decode_per_token", "total")
    )
    return Probe(first_token, per_token, max(0.0, first["total"] - total) / 1e3, bounds)
