"""The package as a whole: what importing it brings and leaves alone, its public names, its version."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsevlm
from forks import run_forks

ROOT = Path(__file__).parents[1]
READS_ALL = "import sparsevlm, sparsevlm.inputs; [getattr(sparsevlm, name) for name in sparsevlm.__all__]"
CONTENTS = ("", 'raise RuntimeError("operator torchvision::nms does not exist")\n')
REPLACES_NOTHING = (
    f"import sys; before = dict(sys.modules); {READS_ALL}\n"
    "assert all(sys.modules.get(name) is module for name, module in before.items()), 'replaced'\n"
    "assert not [name for name, module in sys.modules.items() if module is None], 'hidden'\n"
    "assert 'torchvision' not in sys.modules, 'imported'\n"
)


def python(code):
    """Run code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What is seen behind transformers' import where a torchvision works and where a broken one is installed."""
    place = tmp_path_factory.mktemp("installed")
    package, info = place / "torchvision", place / "torchvision-0.28.0.dist-info"
    package.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    file = package / "__init__.py"
    codes = [f"open({str(file)!r}, 'w').write({content!r})\n{REPLACES_NOTHING}" for content in CONTENTS]
    file.write_text("")
    return run_forks("import torch, transformers", codes, path=place)


@pytest.mark.parametrize("content", CONTENTS)
def test_importing_replaces_no_module(imported, content):
    """Neither a torchvision that works nor a broken one is taken away, imported, or stood in for."""
    done = imported[CONTENTS.index(content)]
    assert done.returncode == 0, done.stderr


def test_importing_brings_nothing_of_the_command_line():
    """Older transformers bring rich themselves, through httpx, where it is installed."""
    code = f"import sys, torch, transformers; before = set(sys.modules); {READS_ALL}\n"
    done = python(f"{code}print(sorted({{'matplotlib', 'typer', 'rich'}} & (set(sys.modules) - before)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_public_names_are_shown_before_they_are_used():
    done = python("import sys, sparsevlm; print(*dir(sparsevlm)); assert 'torch' not in sys.modules")
    assert set(sparsevlm.__all__) | {"__version__"} <= set(done.stdout.split()), done.stderr


def test_every_public_name_is_there():
    assert sparsevlm.__all__ == sorted(sparsevlm.__all__)
    assert all(getattr(sparsevlm, name).__name__ == name for name in sparsevlm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'apply'"):
        sparsevlm.apply  # noqa: B018


def test_what_the_documents_name_is_public():
    """By ``sparsevlm.X`` or ``from sparsevlm import X``; modules are there to be imported."""
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
    named = set(re.findall(r"\bsparsevlm\.([A-Za-z_]\w*)", text))
    for names in re.findall(r"from sparsevlm import ([\w, ]+)", text):
        named |= set(names.replace(",", " ").split())
    assert {"SelectionContext", "Selector", "apply_sparsevlm"} <= named
    unknown = {name for name in named - set(sparsevlm.__all__) if not importlib.util.find_spec(f"sparsevlm.{name}")}
    assert not unknown


def test_one_version():
    assert "version" in re.search(r"^dynamic = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"\nversion: {sparsevlm.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (first, *_) = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first == sparsevlm.__version__


def test_an_install_without_a_version_gets_a_torch_that_was_tested():
    """From the one of the GPU's tests to the newest that the README says was tried."""
    oldest, beyond = re.search(r'"torch>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text()).groups()
    in_sessions = re.search(r'^TORCH = .*"torch==([\d.]+)\.\d+"\)', (ROOT / "noxfile.py").read_text(), re.MULTILINE)[1]
    major, minor = map(int, beyond.split("."))
    newest = f"{major}.{minor - 1}"
    tested = re.search(r"^\| tested \|.*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert f"torch {in_sessions} on CPU, of {newest} exactness" in tested
    assert f"; torch {oldest} with" in tested
    assert f"torch from {oldest} to {newest}" in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def test_an_install_of_vllm_gets_one_that_was_tested():
    from sparsevlm.plugins.vllm.compat import TESTED

    pages = {
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/install.md", "docs/vllm.md")
    }
    for page in pages.values():
        assert set(re.findall(r'"\.\[vllm\]"(.*?)(?:`| &&|\n)', page)) == {f' "vllm=={TESTED[-1]}"'}
    assert f"Tested on vLLM {' and '.join(TESTED)}; others are refused" in pages["docs/vllm.md"]


def test_warnings_begin_with_the_librarys_name():
    """So that a reader of a log knows who speaks, whatever its format."""
    found = {}
    for path in Path(sparsevlm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("warnings.warn", "logger.warning")):
                texts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                found[f"{path.name}:{node.lineno}"] = next(text for text in texts if str(text).strip())
    assert len(found) > 10
    assert {place: text for place, text in found.items() if not text.startswith("sparsevlm:")} == {}
