"""VQA accuracy: agreement with human annotators, after the normalisation of the VQA challenge.

Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, section 3.3, and the evaluation page of
visualqa.org. Written from those rules: the libraries that hold them are parts of whole evaluation frameworks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LEAST_ANSWERS = 4  # each annotator is compared with the others, and three of them have to agree

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS.split())}
# Only those whose form without apostrophes is no word of its own.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def _without_apostrophes(contraction: str) -> list[str]:
    """Spellings with one apostrophe, or all of them, left out."""
    places = [i for i, letter in enumerate(contraction) if letter == "'"]
    return [contraction.replace("'", ""), *(contraction[:i] + contraction[i + 1 :] for i in places)]


_SPELLINGS = {spelling: whole for whole in _CONTRACTIONS.split() for spelling in _without_apostrophes(whole)}


def normalised(text: str) -> str:
    """Lower case, no articles, number words as digits, apostrophes of contractions, punctuation removed.

    Punctuation beside a space, or anywhere in a text with a comma between digits, is dropped; any other becomes a
    space. Periods go unless a digit follows.
    """
    text = " ".join(text.split()).lower()
    drop_all = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_space or drop_all else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", out).split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the others / 3).

    Parameters
    ----------
    prediction : str
    answers : sequence of str
        One per annotator (ten in the VQA data sets), at least :data:`LEAST_ANSWERS`.
    """
    given = normalised(prediction)
    matches = [normalised(answer) == given for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)
