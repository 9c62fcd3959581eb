"""Lists of names on the pages of docs/reference, for who reads them in the repository: from docstrings.

``python -m benchmark.reference_lists`` writes them anew.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "reference"
_LIST = re.compile(r"<!-- names -->\n.*?<!-- end of names -->", re.DOTALL)
# A directive of mkdocstrings, with the members that it shows where it does not show all.
_DIRECTIVE = re.compile(r"^::: (?P<path>\S+)$(?:\n    options:\n      members: \[(?P<members>.*)\]$)?", re.MULTILINE)
_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_MODULE = re.compile(r"^(?:[a-z_]*\.)+")
_SENTENCE = re.compile(r"(?<=[^.])\.(?=\s|$)")
# An entry of a docstring's list of parameters or attributes.
_ENTRY = re.compile(r"^(?P<names>\w+(?:, \w+)*) : (?P<kind>.*)\n?(?P<text>(?:    .*\n?)*)", re.MULTILINE)
_ATTRIBUTES = re.compile(r"^Attributes\n-+\n(.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
_FOOT = (
    "Arguments, types and errors stand in the docstrings: in the source that the names lead to, by `help`, and below\n"
    "on the site that `nox -s docs` builds."
)


def main() -> None:
    """Writes the lists of all pages."""
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(with_list(page.read_text(encoding="utf-8")), encoding="utf-8")


def with_list(text: str) -> str:
    """A page whose list has what its directives show; one without a place for it stays as it is."""
    lines = ["<!-- names -->", *list_of(text), "<!-- end of names -->"]
    return _LIST.sub(lambda _: "\n".join(lines), text)


def list_of(text: str) -> list[str]:
    """Lines of the table of a page: every name that it shows, with the first sentence of its docstring.

    Parameters
    ----------
    text : str
        The page, with its directives.
    """
    lines = ["| name | |", "|---|---|"]
    for shown in _DIRECTIVE.finditer(text):
        found = _find(shown["path"])
        source = Path(inspect.getsourcefile(found) or "").relative_to(ROOT)
        lines.append(f"| [`{shown['path']}`](../../{source}) | {_first_sentence(found)} |")
        members = _members(found) if inspect.isclass(found) else {}
        names = re.findall(r"\w+", shown["members"]) if shown["members"] else members
        lines += [f"| {_shown(found.__name__, name)} | {members[name]} |" for name in names]
    return [*lines, *_options(text), "", _FOOT]


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _members(cls: type) -> dict[str, str]:
    """What the members of a class are: its attributes, several of one entry together, then methods and properties."""
    members = {}
    for attributes in _ATTRIBUTES.findall(inspect.getdoc(cls) or ""):
        for entry in _ENTRY.finditer(attributes):
            members[entry["names"]] = _plain(entry["text"] or entry["kind"])
    own = {name: value for name, value in vars(cls).items() if not name.startswith("_") or name == "__call__"}
    return members | {name: _first_sentence(value) for name, value in own.items() if _is_method(value)}


def _shown(owner: str, names: str) -> str:
    return ", ".join(f"`{owner}.{name}`" for name in names.split(", "))


def _is_method(value: Any) -> bool:
    is_method = isinstance(value, (property, classmethod, staticmethod)) or inspect.isroutine(value)
    return is_method and bool(inspect.getdoc(value))


def _options(text: str) -> Iterator[str]:
    """A second table, of the options, on the page that shows their class."""
    from sparsevlm import SparseVLMConfig

    if "::: sparsevlm.SparseVLMConfig" not in text:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(SparseVLMConfig)}
    yield from ("", "| option | values | default | |", "|---|---|---|---|")
    for option in _ENTRY.finditer(inspect.getdoc(SparseVLMConfig) or ""):
        name, values = option["names"], option["kind"].removesuffix(", optional")
        yield f"| `{name}` | {values} | `{defaults[name]!r}` | {_plain(option['text'])} |"


def _first_sentence(found: Any) -> str:
    return _plain(inspect.getdoc(found) or "")


def _plain(docstring: str) -> str:
    """First sentence of a docstring as Markdown, without its full stop."""
    sentence = _SENTENCE.split(" ".join(docstring.split("\n\n", maxsplit=1)[0].split()), maxsplit=1)[0]
    plain = _ROLE.sub(lambda role: f"`{_MODULE.sub('', role[1])}`", sentence)
    return plain.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    main()
