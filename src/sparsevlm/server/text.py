"""From tokens to text as it grows: whole characters, and nothing behind a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF_CHARACTER = "�"
_MOST_HELD = 16  # tokens that are waited for: what is no character by then becomes none


class Detokenizer:
    """Text of a growing list of tokens, piece by piece.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._before = self._said = 0  # tokens from the last piece but one on; from the last piece on

    def push(self, token: int) -> str:
        """The text that a token adds; empty in the middle of a character."""
        self._ids.append(token)
        whole = self._decoded(self._ids[self._before :])
        if whole.endswith(_HALF_CHARACTER) and len(self._ids) - self._said < _MOST_HELD:
            return ""
        return self._piece(whole)

    def end(self) -> str:
        """What is left when no token follows."""
        return self._piece(self._decoded(self._ids[self._before :]))

    def _piece(self, whole: str) -> str:
        # Decoded with the piece before it: alone, the first token of a text loses its space in some tokenizers.
        before = self._decoded(self._ids[self._before : self._said])
        self._ids = self._ids[self._said :]
        self._before, self._said = 0, len(self._ids)
        return whole[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopScanner:
    """Passes text on up to the first stop text; holds back what may be the beginning of one.

    Parameters
    ----------
    stops : sequence of str

    Attributes
    ----------
    found : bool
        Whether a stop text came.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may go out now."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        places = [place for place in map(self._held.find, self._stops) if place >= 0]
        if places:
            self.found, out = True, self._held[: min(places)]
            self._held = ""
            return out
        n_held = max(self._beginning(stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - n_held], self._held[len(self._held) - n_held :]
        return out

    def end(self) -> str:
        """What was held back, when no text follows."""
        out, self._held = self._held, ""
        return out

    def _beginning(self, stop: str) -> int:
        """Characters at the end of the text that a stop text begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
