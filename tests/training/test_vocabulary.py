"""Words that training shows in place of those on the lists of drawn tasks."""

import random

import pytest
from training.drawn.vocabulary import any_words, vocabulary, words_of
from training.drawn.written import recorded

from sparsevlm.material import EVALUATION, TRAINING, draw
from sparsevlm.material import words as lists

SEED = 1_000_003


def test_words_held_out_for_evaluation_are_not_among_them():
    held_out = {word.lower() for word in lists.held_out()}
    assert {"david", "hayes", "school"} <= held_out
    known = vocabulary(["the school of david hayes teaches iteration, and tokens of it"])
    assert {"teaches", "iteration", "tokens"} <= set(known)
    assert not {"school", "david", "hayes"} & set(known)
    assert known == vocabulary(["tokens of it and iteration teaches the school of david hayes"])
    assert len(known) == len(set(known)) > len({*["the", "of", "teaches", "iteration", "and", "tokens", "of", "it"]})


def test_words_of_a_tokenizer_are_whole_ones():
    class Pieces:
        def get_vocab(self):
            return {"ĠLisbon": 0, "Ġtide": 1, "water": 2, "Ġx1": 3, "Ġof": 4, "ĠDavid": 5, "Ġlisbon": 6}

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens).replace("Ġ", " ")

    assert words_of(Pieces()) == ["david", "lisbon", "tide"]
    assert {"tide", "lisbon", "david"} & set(vocabulary(["so"], words_of(Pieces()))) == {"tide"}


def test_a_document_shows_any_words_and_is_the_same_for_a_seed():
    known = [f"zq{letter}x" for letter in "abcdefghijklmnopqrstuvwxyz"]
    listed = {name.lower() for kind in ("given", "surname", "city") for name in lists.words(kind, TRAINING)}

    def shown():
        with recorded() as lines, any_words(random.Random(1), known):
            page = draw("documents", "form", SEED, TRAINING, 8)
        return page, {word.strip(".,:").lower() for line in lines for word in line.text.split()}

    of_split = lists.part
    page, words = shown()
    assert lists.part is of_split
    assert words & set(known)
    assert not words & listed
    assert page.turns == shown()[0].turns
    with recorded() as lines:
        draw("documents", "form", SEED, TRAINING, 8)
    assert {word.strip(".,:").lower() for line in lines for word in line.text.split()} & listed


def test_tasks_of_the_evaluation_keep_their_words():
    with any_words(random.Random(1), ["some", "words"]), pytest.raises(ValueError, match="stay as they are"):
        draw("documents", "form", 3, EVALUATION, 8)
    assert lists.words("city", EVALUATION)
