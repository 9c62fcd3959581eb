"""Steps of a benchmark, as they are told to whoever shows its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

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
    seconds_left : float or None
        That the case still takes, once every provider had a call whose time counts.
    """

    stage: str
    provider: str = ""
    number: int = 0
    of: int = 0
    begins: bool = False
    seconds_left: float | None = None


OnStep: TypeAlias = Callable[[Step], None]
