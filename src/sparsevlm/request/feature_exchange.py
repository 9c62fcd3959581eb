"""Visual features on their way between a call and the conversation that it goes on with."""

from __future__ import annotations

from dataclasses import dataclass

from .kept_features import KeptFeatures


class FeaturesTakenError(Exception):
    """Ends a pass that only had to say what its images become."""


@dataclass
class FeatureExchange:
    """Features that a call brings to its prompt, or takes from it.

    Attributes
    ----------
    given : KeptFeatures, optional
        To be put into the prompt.
    taken : KeptFeatures, optional
        What the prompt's own images have become.
    only_takes : bool
        Whether the pass ends before the decoder.
    """

    given: KeptFeatures | None = None
    taken: KeptFeatures | None = None
    only_takes: bool = False
    _is_used: bool = False

    def hand_over(self) -> KeptFeatures | None:
        """What is to be put into the first pass of the call."""
        given = None if self._is_used else self.given
        self._is_used = True
        return given


@dataclass(frozen=True)
class NewFeatures:
    """Images and videos that a turn brings, encoded before its prompt.

    Attributes
    ----------
    features : KeptFeatures
    n_cached : int or None
        Images that were encoded in earlier calls; ``None``: nobody looked for them.
    apart : str or None
        Why the tower's own modules ran one by one, where they could have been recorded.
    """

    features: KeptFeatures
    n_cached: int | None = None
    apart: str | None = None
