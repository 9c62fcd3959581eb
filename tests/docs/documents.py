"""Documents of the repository: which there are, and what is in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(
    r"(?:<!-- (?:not run: (?P<why>[^>]*?)|(?P<role>main|test) command) -->\n)?"
    r"```(?P<language>\w*)\n(?P<code>.*?)^```",
    re.DOTALL | re.M,
)


@dataclass(frozen=True)
class Block:
    """A block of code; ``why`` says what it needs, where it is marked as not to be run.

    ``role`` is ``"main"`` or ``"test"`` of the README's two commands, which continuous integration runs.
    """

    language: str
    code: str
    why: str | None
    role: str | None


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path) -> list[Block]:
    names = ("language", "code", "why", "role")
    return [Block(**{name: found[name] for name in names}) for found in FENCE.finditer(read(document))]


def prose(document: Path) -> str:
    """Text without blocks of code and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", read(document)), flags=re.DOTALL)
