"""Conversations of any lengths in arrays of fixed sizes, so that one CUDA graph takes them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.drawn.conversations import Conversation, Numbers, windows_of
from training.drawn.written import CELLS, UNKNOWN
from training.pixels import MERGE, PATCH
from training.sequences import IGNORE

PER_TOKEN = MERGE**2  # patches


@dataclass(frozen=True)
class Limits:
    """What a batch holds at most.

    Parameters
    ----------
    tokens : int
        Of all chats, pictures included; the other limits follow from it.
    side : int
        Visual tokens along a window of the tower.
    longest : int
        Visual tokens of a picture.
    """

    tokens: int
    side: int
    longest: int = 2112

    def __post_init__(self) -> None:
        if self.tokens < 2 * self.longest:
            raise ValueError(f"a batch must have at least {2 * self.longest} tokens, got {self.tokens}")

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return self.tokens * 3 // 4

    @property
    def windows(self) -> int:
        """Windows, of what fills the rest as well."""
        return self.visual // 4

    @property
    def chats(self) -> int:
        """Conversations, and pictures."""
        return self.tokens // 64

    @property
    def answers(self) -> int:
        """Answers."""
        return self.tokens // 32

    @property
    def answered(self) -> int:
        """Tokens of answers."""
        return self.tokens // 6

    @property
    def shown(self) -> int:
        """Pieces of text on pictures."""
        return self.tokens // 6


class Packed(NamedTuple):
    """A batch, of numpy arrays or of tensors.

    Attributes
    ----------
    patches : uint8 of shape (4 * visual, 3 * 14 * 14)
    places : int64 of shape (4 * visual, 2)
        Row and column of each patch.
    window_starts, picture_starts : int32
        In patches, of ``windows + 1`` and ``chats + 1``.
    ids : int64 of shape (tokens,)
    take : int64 of shape (tokens,)
        What is at each place: row of the text's embeddings, or ``tokens`` and more: a visual token.
    positions : int64 of shape (3, tokens)
    chat_starts : int32 of shape (chats + 1,)
    rows, targets, owners : int64 of shape (answered,)
        Places that predict a token of an answer, that token or ``IGNORE``, and which answer it is of.
    families : int64 of shape (answers,)
        Index of each answer's family, or the number of families where there is no answer.
    shown_at, shown : int64 of shape (shown,)
        Visual token in the order of windows, and a piece of text that it shows, or ``IGNORE``.
    letters : uint8 of shape (visual, cells)
        Letters that each visual token shows, in the order of windows.
    """

    patches: Numbers
    places: Numbers
    window_starts: Numbers
    picture_starts: Numbers
    ids: Numbers
    take: Numbers
    positions: Numbers
    chat_starts: Numbers
    rows: Numbers
    targets: Numbers
    owners: Numbers
    families: Numbers
    shown_at: Numbers
    shown: Numbers
    letters: Numbers


def empty(limits: Limits, n_families: int) -> Packed:
    """A batch without any conversation."""
    visual, tokens = limits.visual, limits.tokens
    return Packed(
        np.zeros((visual * PER_TOKEN, 3 * PATCH**2), np.uint8),
        np.zeros((visual * PER_TOKEN, 2), np.int64),
        _starts([], visual * PER_TOKEN, limits.side**2 * PER_TOKEN, limits.windows),
        _starts([], visual * PER_TOKEN, limits.longest * PER_TOKEN, limits.chats),
        np.zeros(tokens, np.int64),
        np.arange(tokens),
        np.zeros((3, tokens), np.int64),
        _starts([], tokens, limits.longest, limits.chats),
        np.zeros(limits.answered, np.int64),
        np.full(limits.answered, IGNORE, np.int64),
        np.zeros(limits.answered, np.int64),
        np.full(limits.answers, n_families, np.int64),
        np.zeros(limits.shown, np.int64),
        np.full(limits.shown, IGNORE, np.int64),
        np.full((visual, CELLS), UNKNOWN, np.uint8),
    )


class Packer:
    """Fills batches.

    Parameters
    ----------
    limits : Limits
    families : sequence of str
        In the order of their indices.
    """

    def __init__(self, limits: Limits, families: Sequence[str]):
        self._limits, self._families = limits, list(families)
        self._held: list[Conversation] = []

    def add(self, one: Conversation) -> bool:
        """Take a conversation if it still fits.

        Raises
        ------
        ValueError
            If it fits no batch.
        """
        if _fits([*self._held, one], self._limits):
            self._held.append(one)
            return True
        if not self._held:
            raise ValueError(
                f"a conversation of {one.ids.size} tokens about pictures of {one.grids} fits no batch of {self._limits}"
            )
        return False

    def pack(self) -> Packed:
        """The batch of what was taken; the next one begins without any."""
        held, limits, self._held = self._held, self._limits, []
        batch = empty(limits, len(self._families))
        windows, pictures, seen, length, answered, n_answers, n_shown = [], [], 0, 0, 0, 0, 0
        for one in held:
            batch.patches[seen * PER_TOKEN :][: len(one.patches)] = one.patches
            n_ids = one.ids.size
            batch.ids[length:][:n_ids] = one.ids
            batch.positions[:, length : length + n_ids] = one.positions
            slots = length + np.flatnonzero(one.is_visual)
            part = slice(n_shown, n_shown + len(one.shown))
            by_window = np.argsort(windows_of(*one.grids[0], limits.side).order)
            batch.shown_at[part], batch.shown[part] = seen + by_window[one.shown[:, 0]], one.shown[:, 1]
            n_shown, first_token = part.stop, seen
            for rows, cols in one.grids:
                tower, n_tokens = windows_of(rows, cols, limits.side), rows * cols
                batch.letters[seen : seen + n_tokens] = one.letters[seen - first_token :][:n_tokens][tower.order]
                batch.places[seen * PER_TOKEN :][: len(tower.places)] = tower.places
                batch.take[slots[:n_tokens][tower.order]] = limits.tokens + seen + np.arange(n_tokens)
                windows += (tower.sizes * PER_TOKEN).tolist()
                pictures.append(n_tokens * PER_TOKEN)
                slots, seen = slots[n_tokens:], seen + n_tokens
            for first, stop in one.answers:
                part = slice(answered, answered + stop - first)
                batch.rows[part] = length + np.arange(first, stop) - 1
                batch.targets[part] = one.ids[first:stop]
                batch.owners[part] = n_answers
                batch.families[n_answers] = self._families.index(one.family)
                answered, n_answers = part.stop, n_answers + 1
            length += n_ids
        return batch._replace(
            window_starts=_starts(windows, limits.visual * PER_TOKEN, limits.side**2 * PER_TOKEN, limits.windows),
            picture_starts=_starts(pictures, limits.visual * PER_TOKEN, limits.longest * PER_TOKEN, limits.chats),
            chat_starts=_starts([one.ids.size for one in held], limits.tokens, limits.longest, limits.chats),
        )


def _fits(held: Sequence[Conversation], limits: Limits) -> bool:
    grids = [grid for one in held for grid in one.grids]
    visual = sum(rows * cols for rows, cols in grids)
    length = sum(one.ids.size for one in held)
    spans = [stop - first for one in held for first, stop in one.answers]
    n_windows = sum(windows_of(*grid, limits.side).sizes.size for grid in grids)
    return (
        visual <= limits.visual
        and length <= limits.tokens
        and n_windows + -(-(limits.visual - visual) // limits.side**2) <= limits.windows
        and len(grids) + -(-(limits.visual - visual) // limits.longest) <= limits.chats
        and len(held) + -(-(limits.tokens - length) // limits.longest) <= limits.chats
        and max(one.ids.size for one in held) <= 2 * limits.longest
        and max(rows * cols for rows, cols in grids) <= limits.longest
        and sum(spans) <= limits.answered
        and len(spans) <= limits.answers
        and sum(len(one.shown) for one in held) <= limits.shown
    )


def _starts(lengths: Sequence[int], total: int, most: int, count: int) -> Numbers:
    """Starts of sequences; what is left is cut in sequences of at most ``most``, so that every token is in one."""
    left = total - sum(lengths)
    filling = [most] * (left // most) + ([left % most] if left % most else [])
    ends = np.cumsum([0, *lengths, *filling])
    return np.pad(ends, (0, count + 1 - ends.size), mode="edge").astype(np.int32)
