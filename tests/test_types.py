"""What a type checker finds in a user's script."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import sparsevlm
from sparsevlm import SparseVLMConfig, config
from sparsevlm.typed_options import AllOptions, MoreOptions

TESTS = Path(__file__).parent
MARK = re.compile(r"  # type: ignore\[([\w-]+)\]$", re.MULTILINE)


def checked(script: Path) -> dict[int, str]:
    """Kinds of the errors of a script, by line."""
    options = ["--config-file", TESTS.parent / "pyproject.toml", "--no-error-summary", "--follow-imports", "silent"]
    source = Path(sparsevlm.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, options), str(script)],
        capture_output=True, text=True, check=False, cwd=TESTS.parent, env={**os.environ, "MYPYPATH": str(source)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r":(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.MULTILINE)
    return {int(line): kind for line, kind in found}


def test_mypy_finds_the_mistakes_of_a_users_script_and_no_others(tmp_path):
    pytest.importorskip("mypy")
    lines = (TESTS / "user_mistakes.py").read_text(encoding="utf-8").splitlines()
    planted = {number: mark[1] for number, line in enumerate(lines, 1) if (mark := MARK.search(line))}
    script = tmp_path / "script.py"
    script.write_text("\n".join(MARK.sub("", line) for line in lines), encoding="utf-8")
    assert len(planted) >= 16
    assert checked(script) == planted


def test_the_types_of_options_are_those_of_the_configuration():
    fields = {field.name for field in dataclasses.fields(SparseVLMConfig)}
    assert set(AllOptions.__annotations__) == fields
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
