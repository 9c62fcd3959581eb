"""The page of error messages quotes messages that exist, and every message that a user can meet."""

from __future__ import annotations

import ast
import re

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


FILES = sorted([*PACKAGE.rglob("*.py"), *COMMAND.glob("*.py")])
FOUND = {path: messages_of(path) for path in FILES}
RAISED = {
    message
    for path, (raised, _) in FOUND.items()
    if path.is_relative_to(COMMAND) or path.relative_to(PACKAGE).parts[0] not in INTERNAL
    for message in raised
}
TEXTS = {text for raised, texts in FOUND.values() for text in raised | texts}
# First cells of the page's tables.
QUOTED = [
    quoted
    for line in read(PAGE).splitlines()
    if line.startswith("| `")
    for quoted in re.findall("`([^`]*)`", line.split(" | ")[0])
]


def fits(quoted: str, message: str) -> bool:
    return message.startswith(quoted.removesuffix(ANY).rstrip())


def test_the_page_and_the_package_were_read():
    assert len(QUOTED) > 250
    assert len(RAISED) > 250


def test_every_quoted_message_exists():
    gone = [quoted for quoted in QUOTED if not any(fits(quoted, text) for text in TEXTS)]
    assert not gone, "no text of the package begins so"


def test_every_message_is_on_the_page():
    missing = [message for message in RAISED - set(IGNORED) if not any(fits(quoted, message) for quoted in QUOTED)]
    assert not sorted(missing), "docs/troubleshooting.md does not explain these"


def test_what_is_ignored_exists():
    assert set(IGNORED) <= RAISED


def test_a_message_that_is_not_on_the_page_is_found():
    assert not any(fits(quoted, "this message is on no page") for quoted in QUOTED)
    assert fits("… must be at least …, got …", "… must be at least …, got ….")
    assert not fits("… must be at least …, got …", "… must be at most …, got ….")
