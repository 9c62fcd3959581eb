"""Wordings of questions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .example import Turn

_SHORT = ("", "", "", " Answer briefly.", " Answer in a few words.")
_FEW_WORDS = 4


def ask(
    rng: random.Random, wordings: Sequence[str], answer: str | Sequence[str], metric: str = "exact", **named: object
) -> Turn:
    """A question in one of several wordings.

    Parameters
    ----------
    rng : random.Random
    wordings : sequence of str
        With the names of ``named`` in braces.
    answer : str or sequence of str
        The answer, or all that count.
    metric : str
    named : object
        What stands in the place of the names; ``box`` is the place of what is asked about, ``follow`` the turn behind.
    """
    box, follow = named.pop("box", None), named.pop("follow", None)
    text = rng.choice(wordings).format(**named)
    answers = (answer,) if isinstance(answer, str) else tuple(answer)
    if metric != "iou" and len(answers[0].split()) <= _FEW_WORDS:
        text += rng.choice(_SHORT)
    return Turn(text, answers, metric, box, follow)  # type: ignore[arg-type]
