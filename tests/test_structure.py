"""Imports run one way through the rooms of the package, and nothing heavy loads early."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparsevlm
from sparsevlm import apply_sparsevlm
from sparsevlm.selection.selectors import SELECTORS
from toys import tiny_model

ROOT = Path(sparsevlm.__file__).parent
TESTS = Path(__file__).parent
# A room may import rooms of a lower level, and itself.
LEVELS = {
    "config": 0,
    "report_sample": 0,
    "report_total": 0,
    "collision": 0,
    "error_notes": 0,
    "cores": 0,
    "compat": 0,
    "template": 0,
    "scenes": 0,
    "bundled": 0,
    "kernels": 0,
    "smol": 1,
    "report": 1,
    "selection": 1,
    "models": 1,
    "material": 1,
    "typed_options": 2,
    "request": 2,
    "hooks": 3,
    "engine": 3,
    "warmup": 4,
    "inputs": 4,
    "generate": 4,
    "visualization": 5,
    "state": 5,
    "api": 6,
    "evaluation": 7,
    "bench": 7,
    "plugins": 7,
    "server": 7,
    "explore": 7,
    "ray": 7,
    "cli": 8,
    "__main__": 9,
    "__init__": 9,
}
# The same within evaluation.
EVALUATION_LEVELS = {
    "settings": 0,
    "metrics": 1,
    "suites": 2,
    "execution": 3,
    "reporting": 4,
    "run": 5,
    "__init__": 6,
}
# Of a room's names, what may stand in no other room.
FAMILIES = re.compile(r"qwen|llava", re.IGNORECASE)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[tuple[str, ...]]:
    """Dotted names of ours that a file imports, wherever in the file it does."""
    package = ("sparsevlm", *path.relative_to(ROOT).parts[:-1])
    modules: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*full, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        modules |= {name for name in names if name[0] == "sparsevlm" and len(name) > 1}
    return modules


def imported_rooms(path: Path) -> set[str]:
    return {name[1] for name in imported_modules(path) if name[1] in LEVELS}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in LEVELS, f"{room} is a new room: give it a level"
    for other in imported_rooms(path) - {room}:
        assert LEVELS[other] < LEVELS[room], f"{room} imports {other}"


@pytest.mark.parametrize("path", sorted((ROOT / "evaluation").rglob("*.py")), ids=lambda path: str(path.name))
def test_imports_run_downwards_within_evaluation(path):
    place = path.relative_to(ROOT / "evaluation").parts[0].removesuffix(".py")
    assert place in EVALUATION_LEVELS, f"evaluation/{place} is new: give it a level"
    imported = {name[2] for name in imported_modules(path) if name[1] == "evaluation"}
    for other in imported - {place}:
        assert EVALUATION_LEVELS[other] < EVALUATION_LEVELS[place], f"{place} imports {other}"


def names_in(path: Path) -> set[str]:
    """Identifiers, imported names and attributes of a file; docstrings and comments left out."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, (ast.ImportFrom, ast.Import)):
            found |= {part for alias in node.names for part in alias.name.split(".")}
            found |= set((getattr(node, "module", None) or "").split("."))
    return found


def files_of(*rooms: str) -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if room_of(path) in rooms]


@pytest.mark.parametrize("path", files_of("hooks", "engine", "request", "generate", "state"), ids=lambda p: str(p.name))
def test_both_paths_name_no_family(path):
    assert not FAMILIES.search(path.read_text(encoding="utf-8")), f"{path} names a model family"


@pytest.mark.parametrize("path", files_of("hooks", "engine", "request"), ids=lambda path: str(path.name))
def test_both_paths_name_no_selector(path):
    """But through the registry, where options are resolved."""
    classes = {kind.__name__ for kind in SELECTORS.values()}
    assert not names_in(path) & classes
    assert "selectors" not in names_in(path) or path.name in ("options.py", "session.py")


# Folders of tests that look at no single room.
OTHER_TESTS = {"benchmark", "training", "e2e", "parity", "docs", "examples"}


def test_tests_lie_where_the_rooms_lie():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    folders = {path.parent.relative_to(TESTS).parts[0] for path in TESTS.rglob("*/test_*.py")}
    assert folders - rooms <= OTHER_TESTS
    assert rooms <= folders


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by name, wherever they lie."""
    names = [path.name for path in TESTS.rglob("*.py") if path.name not in ("__init__.py", "conftest.py")]
    assert sorted(set(names)) == sorted(names)


def test_the_benchmark_reads_no_engine():
    for path in files_of("bench"):
        assert "engine" not in imported_rooms(path), f"{path} reads the engine"


def test_only_one_method_of_the_model_is_replaced():
    model = tiny_model()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    apply_sparsevlm(model, engine=True)
    added = {name: set(vars(module)) - before[name] for name, module in model.named_modules()}
    assert {name: own for name, own in added.items() if own} == {"": {"generate"}, "model": {"_sparsevlm_state"}}


@pytest.mark.parametrize("module", ["sparsevlm", "sparsevlm.cli.commands", "sparsevlm.config", "sparsevlm.report"])
def test_torch_and_transformers_load_late(module):
    code = f"import {module}, sys; assert not {{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_no_remote_code_no_quiet_download():
    """Weights come from safetensors only; code never comes with them."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for forbidden in (
            "torch.load(",
            "import pickle",
            "trust_remote_code=True",
            "import requests",
            "urllib.request",
        ):
            assert forbidden not in text, f"{path}: {forbidden}"
