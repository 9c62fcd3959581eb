"""Words for training: any, so that letters are read rather than a few known names told apart."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerFast

from sparsevlm.material import EVALUATION
from sparsevlm.material import words as lists

_WORD = re.compile(r"\b[a-z]{2,12}\b")
_PIECE = re.compile(r" [A-Za-z]{3,12}")
_MADE_UP = 3  # real words for each that is made up
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "sl", "st", "th", "tr")
_VOWELS = (*"aeiou", "ai", "ea", "ee", "ou")
_ENDS = ("", "", *"dklmnrst", "ck", "nd", "ng", "rt", "st")


def vocabulary(texts: Iterable[str], known: Iterable[str] = (), seed: int = 0) -> list[str]:
    """Words of texts and ``known`` ones by the alphabet, then made-up ones; none that is held out for evaluation."""
    held_out = {part.lower() for name in lists.held_out() for part in name.split()}
    real = sorted({*known, *(word for text in texts for word in _WORD.findall(text))} - held_out)
    rng, made_up = random.Random(seed), dict[str, None]()
    while len(made_up) < len(real) // _MADE_UP:
        syllables = ("".join(map(rng.choice, (_ONSETS, _VOWELS, _ENDS))) for _ in range(rng.choice((1, 2, 2, 3))))
        made_up["".join(syllables)] = None
    return real + sorted(set(made_up) - held_out - set(real))


def words_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Words, names among them, that are one token behind a space; in small letters."""
    pieces = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    return sorted({piece[1:].lower() for piece in pieces if _PIECE.fullmatch(piece)})


@contextmanager
def any_words(rng: random.Random, known: Sequence[str]) -> Iterator[None]:
    """Let drawn tasks show any words in place of those on their lists, as many and in as many capitals.

    Parameters
    ----------
    rng : random.Random
    known : sequence of str
        To take words from.
    """
    of_split = lists.part

    def drawn(values: Sequence[str], split: str) -> tuple[str, ...]:
        if split == EVALUATION:
            raise ValueError("words of the evaluation stay as they are")
        # Two alike on a picture would leave a question with two answers.
        chosen = (_like(value, rng, known) for value in of_split(values, split))
        return tuple(dict.fromkeys(chosen))

    lists.part = drawn
    try:
        yield
    finally:
        lists.part = of_split


def _like(value: str, rng: random.Random, known: Sequence[str]) -> str:
    words = (rng.choice(known) for _ in value.split())
    return " ".join(
        word.capitalize() if old[0].isupper() else word for word, old in zip(words, value.split(), strict=True)
    )
