"""MkDocs hook: pages made from files of the repository, and links that lead from one page to another."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# File of the repository by page; every other page is the file of its name in docs/.
SOURCES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "model-card.md": "src/sparsevlm/bundled/README.md",
    "examples.md": "examples/README.md",
}
_PAGES = {source: page for page, source in SOURCES.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages whose source is not in docs/."""
    from mkdocs.structure.files import File

    for page, source in SOURCES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_scripts(content) if page == "examples.md" else content))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    return with_page_links(markdown, page.file.src_uri)


def with_scripts(text: str) -> str:
    """The page of examples with the code of each below the table."""
    parts = [text]
    for script in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {script.name}\n\n```python\n{script.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def with_page_links(markdown: str, page: str) -> str:
    """Markdown of a page whose links lead within the site; links to files that it does not show become plain text.

    Parameters
    ----------
    markdown : str
        Of the source, with links relative to it.
    page : str
        Such as ``"index.md"``.
    """
    source = SOURCES.get(page, f"docs/{page}")

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        found = page_of(path)
        if found is None:
            return text if (ROOT / path).exists() else match[0]
        if path.startswith("examples/") and path.endswith(".py"):
            anchor = posixpath.basename(path).replace(".", "")
        relative = posixpath.relpath(found, posixpath.dirname(page) or os.curdir)
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

    pieces = _FENCE.split(markdown)
    return "".join(piece if piece.startswith("```") else _LINK.sub(link, piece) for piece in pieces)


def page_of(path: str) -> str | None:
    """Page, or image of the site, that shows a file of the repository; ``None``: the site does not show it."""
    if path in _PAGES:
        return _PAGES[path]
    if path.startswith("examples"):
        return _PAGES["examples/README.md"]
    if path.startswith("docs/") and (ROOT / path).is_file():
        return path.removeprefix("docs/")
    return None
