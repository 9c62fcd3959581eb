"""Steps of a benchmark, as they are told to whoever shows its progress, and the time that they are expected to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

COMPARING = "comparing answers"  # the first stage of a case


@dataclass(frozen=True)
class Step:
    """What a benchmark does next.

    Attributes
    ----------
    stage : str
        Such as ``"timed call 3"``.
    provider : str
        Its name; empty where several take part.
    number, of : int
        Its place among the providers of the case, from 1, and how many they are.
    begins : bool
        Whether it is the provider's first step in the case.
    seconds_left : float
        That the case still takes: by the calls that were made, and by what is expected of providers without one.
    """

    stage: str
    provider: str = ""
    number: int = 0
    of: int = 0
    begins: bool = False
    seconds_left: float = 0.0


@dataclass(frozen=True)
class Expected:
    """Seconds that calls of a provider take in a case, before there was one.

    Attributes
    ----------
    ahead : float
        What comes before, and once: captures and compilation of a first call, or this library's warm-up.
    call : float
        A call; of requests of mixed shapes the mean.
    """

    ahead: float
    call: float


NOTHING_EXPECTED: Mapping[Any, Expected] = MappingProxyType({})
OnStep: TypeAlias = Callable[[Step], None]
