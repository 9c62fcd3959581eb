"""The page of error messages quotes messages that exist, and every message that a user can meet."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

from documents import ROOT, read

PACKAGE = ROOT / "src" / "sparsevlm"
COMMAND = ROOT / "benchmark" / "reproduce"  # not installed, and met by users all the same
PAGE = ROOT / "docs" / "troubleshooting.md"
ANY = "…"
# Parts of the package whose errors are no user's: they are caught, or faults of this library.
INTERNAL = ("engine", "kernels")
# Messages that are not on the page, by their beginning, and why.
IGNORED = {
    "module … has no attribute …": "Python's own words for a misspelt name",
    "…": "hands on the words of transformers",
    "… (AutoProcessor does not load: …)": "begins with the words of ImageTextProcessor, which are there",
    "… …": "a row of a dataset with one of the messages that are there",
    "task …, document … of …: …": "a row of lmms-eval with one of the messages that are there",
}


def words(node: ast.expr, constants: dict[str, str]) -> str:
    """A message with ``…`` in the place of everything that differs."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sdr]", ANY, str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part, constants) if isinstance(part, ast.Constant) else ANY for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left, constants) + words(node.right, constants)
    return constants.get(ast.unparse(node), ANY)


def messages_of(path) -> tuple[set[str], set[str]]:
    """Messages that a file raises, and all texts in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        ast.unparse(node.targets[0]): node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    raised = {
        words(node.exc.args[0], constants)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        if not (isinstance(node.exc.args[0], ast.Constant) and isinstance(node.exc.args[0].value, int))  # exit codes
    }
    texts = {words(node, constants) for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr))}
    return {plain(message) for message in raised}, {plain(text) for text in texts}


def plain(text: str) -> str:
    return re.sub(f"{ANY}{{2,}}", ANY, " ".join(text.split()))


@functools.cache
def found() -> dict[Path, tuple[set[str], set[str]]]:
    """By file, what :func:`messages_of` finds; read by the first test, not when tests are collected."""
    return {path: messages_of(path) for path in sorted([*PACKAGE.rglob("*.py"), *COMMAND.glob("*.py")])}


def raised_messages() -> set[str]:
    """Those that a user can meet."""
    return {
        message
        for path, (raised, _) in found().items()
        if path.is_relative_to(COMMAND) or path.relative_to(PACKAGE).parts[0] not in INTERNAL
        for message in raised
    }


@functools.cache
def quoted_messages() -> list[str]:
    """First cells of the page's tables."""
    return [
        quoted
        for line in read(PAGE).splitlines()
        if line.startswith("| `")
        for quoted in re.findall("`([^`]*)`", line.split(" | ")[0])
    ]


def fits(quoted: str, message: str) -> bool:
    return message.startswith(quoted.removesuffix(ANY).rstrip())


def test_the_page_and_the_package_were_read():
    assert len(quoted_messages()) > 250
    assert len(raised_messages()) > 250


def test_every_quoted_message_exists():
    texts = {text for raised, others in found().values() for text in raised | others}
    gone = [quoted for quoted in quoted_messages() if not any(fits(quoted, text) for text in texts)]
    assert not gone, "no text of the package begins so"


def test_every_message_is_on_the_page():
    quotes = quoted_messages()
    missing = [one for one in raised_messages() - set(IGNORED) if not any(fits(quoted, one) for quoted in quotes)]
    assert not sorted(missing), "docs/troubleshooting.md does not explain these"


def test_what_is_ignored_exists():
    assert set(IGNORED) <= raised_messages()


def test_a_message_that_is_not_on_the_page_is_found():
    assert not any(fits(quoted, "this message is on no page") for quoted in quoted_messages())
    assert fits("… must be at least …, got …", "… must be at least …, got ….")
    assert not fits("… must be at least …, got …", "… must be at most …, got ….")


def test_nothing_is_read_when_tests_are_collected(monkeypatch):
    """Every worker collects all of them."""

    def fails(*_, **__):
        raise AssertionError("a file is read")

    spec = importlib.util.spec_from_file_location("collected", __file__)
    with monkeypatch.context() as reads:  # pytest itself reads in order to report
        reads.setattr("ast.parse", fails)
        reads.setattr("documents.read", fails)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
