"""What a type checker finds in a user's script."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from pathlib import Path

import sparsevlm
from sparsevlm import SparseVLMConfig, config
from sparsevlm.typed_options import AllOptions, MoreOptions

ROOT = Path(__file__).parents[1]


def test_mypy_of_the_lint_session_has_to_find_the_planted_mistakes():
    """A comment on a mistake that it does not find is one too many there."""
    _, _, settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.mypy]")
    assert "warn_unused_ignores = true" in settings
    assert '"tests/user_mistakes.py"' in settings
    assert (ROOT / "tests" / "user_mistakes.py").read_text(encoding="utf-8").count("  # type: ignore[") >= 20


def test_the_types_of_options_are_those_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(SparseVLMConfig)}
    assert set(AllOptions.__annotations__) == fields
    (others,) = (
        one for one in inspect.signature(sparsevlm.apply_sparsevlm).parameters.values() if one.kind is one.VAR_KEYWORD
    )
    assert others.annotation == "Unpack[MoreOptions]"
    named = set(sparsevlm.apply_sparsevlm.__annotations__)
    assert fields - named == set(MoreOptions.__annotations__)


def test_the_words_of_options_are_those_of_the_configuration():
    hints = typing.get_type_hints(MoreOptions)
    known = {"raters": config.RATER_MODES, "heads": config.HEADS, "merge": config.MERGES, "schedule": config.SCHEDULES}
    known |= {"preset": config.PRESETS, "weights": config.WEIGHTS, "turns": config.TURNS}
    assert {name: words_of(hints[name]) for name in known} == {name: set(words) for name, words in known.items()}


def words_of(hint) -> set[str]:
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {word for part in typing.get_args(hint) for word in words_of(part)}
