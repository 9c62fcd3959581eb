"""The site shows every document, and its links lead from page to page."""

from __future__ import annotations

import importlib.util
import re

import pytest
from documents import ROOT, read

CONFIG = read(ROOT / "mkdocs.yml")


@pytest.fixture(scope="module")
def pages():
    specification = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "_site" / "pages.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_document_is_in_the_navigation(pages):
    listed = re.findall(r"([\w/-]+\.md)\s*$", CONFIG[CONFIG.index("nav:") :], flags=re.MULTILINE)
    written = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    assert set(listed) == written | set(pages.SOURCES)
    assert len(listed) == len(set(listed))


def test_links_of_the_repository_become_links_of_the_site(pages):
    text = (
        "[a](docs/engine.md#what-runs) [b](CONTRIBUTING.md) ![c](docs/images/demo.png) [d](examples/batch.py) [e](#x)"
    )
    assert pages.with_page_links(text, "index.md") == (
        "[a](engine.md#what-runs) [b](contributing.md) ![c](images/demo.png) [d](examples.md#batchpy) [e](#x)"
    )
    text = "[a](../src/sparsevlm/bundled/README.md) [b](algorithm.md) [c](https://x.org/y.md) [d](../CITATION.cff)"
    assert (
        pages.with_page_links(text, "accuracy.md") == "[a](model-card.md) [b](algorithm.md) [c](https://x.org/y.md) d"
    )
    assert pages.with_page_links("[a](../selectors.md)", "reference/api.md") == "[a](../selectors.md)"
    assert pages.with_page_links("```\n[a](README.md)\n```\n", "contributing.md") == "```\n[a](README.md)\n```\n"


def test_a_link_to_nothing_stays_for_mkdocs_to_refuse(pages):
    assert pages.with_page_links("[a](docs/gone.md)", "index.md") == "[a](docs/gone.md)"


def test_the_page_of_examples_has_their_code(pages):
    page = pages.with_scripts(read(ROOT / "examples" / "README.md"))
    assert "## own_selector.py" in page
    assert "class LargestChange:" in page


def test_the_reference_has_what_the_package_exports():
    import sparsevlm
    import sparsevlm.inputs

    shown = {
        path
        for file in (ROOT / "docs" / "reference").glob("*.md")
        for path in re.findall("^::: (.*)$", read(file), re.M)
    }
    assert {f"sparsevlm.{name}" for name in sparsevlm.__all__} <= shown
    inputs = {f"sparsevlm.inputs.{name}" for name in sparsevlm.inputs.__all__}
    # For the command line and for suites, not for users.
    assert inputs - shown == {
        f"sparsevlm.inputs.{name}" for name in ("load_skeleton", "read_model_type", "torchvision_works")
    }
