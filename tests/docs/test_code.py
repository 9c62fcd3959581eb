"""Code and commands in the documents run as written; what is marked as not run is compiled, and its names exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import re
import shlex
import sys
import warnings

import pytest
import transformers
from documents import DOCUMENTS, EXAMPLES, ROOT, blocks, name_of, prose, read

import sparsevlm
from sparsevlm import SparseVLMState
from sparsevlm.plugins.vllm.options import Options, available
from sparsevlm.selection.selectors import SELECTORS
from toys import make_inputs, tiny_model

# What a block may need to be marked: ``<!-- not run: needs a GPU -->`` before it.
REASONS = {
    "needs a GPU",
    "needs a checkpoint",
    "installs packages",
    "starts a server",
    "needs a server",
    "needs Ray",
    "takes minutes",
}
# What pages say that their code prints, in this order.
PRINTS = {
    "docs/turns.md": [
        "354\n",
        "hold 0 image placeholders, and pixel_values and image_grid_thw were given",
        "leave out pixel_values and image_grid_thw",
        "780\n742\n",
    ]
}
CODE = [document for document in DOCUMENTS if any(block.language in ("python", "bash") for block in blocks(document))]
PYTHON = [document for document in DOCUMENTS if any(block.language == "python" for block in blocks(document))]


def python_blocks(document):
    return [block for block in blocks(document) if block.language == "python"]


@pytest.fixture
def logged():
    """What transformers logs, its warnings of once a process among them."""
    records, root = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = records.append
    transformers.utils.logging.warning_once.cache_clear()
    root.addHandler(handler)
    yield records
    root.removeHandler(handler)


@pytest.mark.parametrize("document", CODE, ids=name_of)
def test_code_runs_from_top_to_bottom(document, tmp_path, monkeypatch, logged, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(document):
        if (block.why and not (block.why == "needs Ray" and ray_is_there())) or block.role:
            continue
        with warnings.catch_warnings():
            if not block.why:  # Ray warns of itself
                warnings.simplefilter("error")
            if block.language == "python":
                exec(compile(block.code, name_of(document), "exec"), namespace)
            elif block.language == "bash":
                for line in block.code.splitlines():
                    run_command(shlex.split(line, comments=True))
    assert [text for record in logged if "deprecated" in (text := record.getMessage())] == []
    printed = capsys.readouterr().out
    for text in PRINTS.get(name_of(document), ()):
        _, found, printed = printed.partition(text)
        assert found, f"not printed, or not in this order: {text}"


def ray_is_there():
    """Whether blocks that need Ray run, as in its own session of nox; it is ended behind the test."""
    return importlib.util.find_spec("ray.data") is not None


@pytest.fixture(autouse=True)
def ray_ended():
    yield
    if "ray.data" in sys.modules:
        sys.modules["ray"].shutdown()


def run_command(words):
    """Run a command of the package in this process; those of examples are run by their own tests."""
    if words[0] == "python":
        assert ROOT / words[1] in EXAMPLES
        return
    from typer.testing import CliRunner

    from sparsevlm.cli import app

    assert words[0] == "sparsevlm", f"mark what is not run: {' '.join(words)}"
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output


def test_a_command_that_fails_is_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"does not exist"):
        run_command(shlex.split("sparsevlm visualize gone.json --image gone.png --out again.png"))
    with pytest.raises(AssertionError, match="mark what is not run"):
        run_command(["rm", "file"])


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_what_needs_a_checkpoint_runs_on_the_small_model(name, tmp_path, monkeypatch, capsys):
    """Behind the imports of the page, with a file and the names of another model and device."""
    monkeypatch.chdir(tmp_path)
    page = python_blocks(ROOT / name)
    (block,) = [block for block in page if block.why == "needs a checkpoint"]
    code = block.code
    for written, other in {
        '"Qwen/Qwen2.5-VL-7B-Instruct"': "bundled_path()",
        '"cuda"': '"cpu"',
        '"bfloat16"': '"float32"',
        ", warmup=True": "",
        "What does the sign say?": "Read the number on the blue card.",
    }.items():
        assert written in code or "warmup" in written
        code = code.replace(written, other)
    before = ast.parse(page[0].code).body
    needed = [node for node in before if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    namespace = {}
    exec(compile(ast.Module(needed, type_ignores=[]), name, "exec"), namespace)
    namespace["draw_scene"](8).image.save("photo.jpg")
    exec(compile(code, name, "exec"), namespace)
    assert "354" in capsys.readouterr().out
    assert namespace["state"].report.average_in <= 64


def test_what_is_not_run_says_why():
    marked = [(name_of(document), block) for document in CODE for block in blocks(document) if block.why]
    assert marked
    for name, block in marked:
        assert block.why in REASONS, f"{name}: {block.why}"
        if block.language == "python":
            compile(block.code, name, "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_is_seen_and_says_its_language(document):
    assert len(fences(read(document))) == 2 * len(blocks(document))
    assert {block.language for block in blocks(document)} <= {"python", "bash", "text", "mermaid"}


def fences(text):
    """Lines that open or close a block, in whatever way Markdown has for it."""
    return re.findall(r"^[ >]*(?:```|~~~).*$", text, re.MULTILINE)


@pytest.mark.parametrize("opening", ["```py title=x", "  ```python", "~~~python", "> ```python"])
def test_a_block_that_would_not_be_run_is_found(opening, tmp_path):
    (tmp_path / "page.md").write_text(f"# Page\n\n{opening}\nraise SystemError\n{opening[: opening.index('p')]}\n")
    assert len(fences(read(tmp_path / "page.md"))) == 2
    assert blocks(tmp_path / "page.md") == []


def attributes(tree, name):
    """Attributes that are read of a name."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


@pytest.mark.parametrize("document", PYTHON, ids=name_of)
def test_names_in_code_exist(document):
    if document.name == "serving.md":  # nox -s server runs it
        pytest.importorskip("fastapi")
    for block in python_blocks(document):
        tree = ast.parse(block.code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sparsevlm":
                module = importlib.import_module(node.module)
                assert [one.name for one in node.names if not hasattr(module, one.name)] == []
        assert {name for name in attributes(tree, "state") if not hasattr(SparseVLMState, name)} == set()
        assert {name for name in attributes(tree, "sparsevlm") if not hasattr(sparsevlm, name)} == set()


def exists(path):
    """Whether a dotted name leads to a module, or from one to something in it."""
    parts = path.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for name in parts[n:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_names_in_sentences_exist(document):
    spans = re.findall(r"`([^`\n]+)`", prose(document))
    of_state = {name for span in spans for name in re.findall(r"(?<![\w.])state\.(?!py\b)(\w+)", span)}
    assert {name for name in of_state if not hasattr(SparseVLMState, name)} == set()
    of_package = {name for span in spans for name in re.findall(r"(?<![\w./-])sparsevlm(?:\.[A-Za-z_]\w*)+", span)}
    assert {name for name in of_package if not exists(name)} == set()


def test_the_names_test_finds_what_does_not_exist():
    assert exists("sparsevlm.inputs.load_model")
    assert exists("sparsevlm.selection.context.Selector")
    assert not exists("sparsevlm.inputs.load_everything")
    assert not exists("sparsevlm.state.remove")


def test_the_readme_begins_with_a_few_lines_of_code():
    first, second = python_blocks(ROOT / "README.md")
    for block in (first, second):
        assert len([line for line in block.code.splitlines() if line.strip()]) <= 12
    assert (first.why, second.why) == (None, "needs a checkpoint")
    before = read(ROOT / "README.md").split("```python")[0]
    assert "pip install" in before
    assert "##" not in before


def test_the_selector_of_the_docs_is_short_and_works():
    (block,) = [block for block in python_blocks(ROOT / "docs" / "selectors.md") if "class " in block.code]
    namespace = {}
    exec(block.code, namespace)
    model = tiny_model(n_layers=12)
    state = sparsevlm.apply_sparsevlm(model, selector=namespace["LargestChange"](), keep=0.5)
    model.generate(**make_inputs([("text", 3), ("image", 10, 10), ("text", 7)]), max_new_tokens=2)
    assert state.report.selector == "largest-change"
    assert state.report.average_in <= 50
    assert len(block.code.strip().splitlines()) <= 11


def rows_of_selectors(document):
    """Line by selector of a table that begins with its name."""
    lines = [line for line in read(document).splitlines() if line.startswith("| `")]
    return {name: line for line in lines for name in re.findall(r"`([\w-]+)`", line.split(" | ")[0])}


def test_the_built_in_selectors_are_documented():
    rows, in_readme = rows_of_selectors(ROOT / "docs" / "selectors.md"), rows_of_selectors(ROOT / "README.md")
    assert set(SELECTORS) <= set(rows)
    assert set(SELECTORS) <= set(in_readme)
    for name in SELECTORS:
        paper = re.findall(r"https://arxiv.org/abs/[\d.]+", rows[name])
        assert re.findall(r"https://arxiv.org/abs/[\d.]+", in_readme[name]) == paper


def test_the_page_of_vllm_has_its_selectors_and_the_default():
    page = read(ROOT / "docs" / "vllm.md")
    (default,) = re.findall(r'^\| `selector` \| .* \| `"([\w-]+)"`', page, re.MULTILINE)
    assert default == Options().selector
    for reads, answer in ((False, r"no \|"), (True, "all text")):
        (names,) = re.findall(rf"^\| (`[^|]+`) \| {answer}", page, re.MULTILINE)
        assert set(re.findall(r"`([\w-]+)`", names)) == {
            name for name in available() if Options(selector=name).reads_text == reads
        }


def test_the_supported_models_are_in_the_readme():
    from sparsevlm.models.registry import supported_model_types

    assert [name for name in supported_model_types() if f"`{name}`" not in read(ROOT / "README.md")] == []
