"""Figures in sentences are those of the stored rows; none is written by hand."""

from __future__ import annotations

import ast
import re

import pytest
from benchmark.accuracy_rows import mean_retained, of_suites
from documents import DOCUMENTS, ROOT, prose, read

from sparsevlm.material.grounds import GROUNDS
from sparsevlm.selection.selectors import DEFAULT, SELECTORS


@pytest.fixture
def tables():
    from benchmark import tables

    return tables


def test_the_readme_begins_with_measured_figures(tables):
    """All of one commit and device, and those of the engine alone beside those of pruning.

    The first paragraph says that no accuracy on real checkpoints is known, the second what of a whole answer the engine
    gives and what pruning.
    """
    before = read(ROOT / "README.md").split("```")[0]
    _, first, second = before.split("\n\n")[:3]
    assert "accuracy on real checkpoints is [not measured](#limits)" in " ".join(first.split())
    answers = re.findall(r"e2e figure: case=v576-b1-n64 provider=(\S+) .*?phase=total", second)
    assert answers == ["hf-dense", "ours-dense", "ours"]
    shown = re.findall(r"e2e figure: case=(\S+) provider=(\S+) (.*?) -->(\d+)<!-- end --> ms", before)
    assert [(case, provider) for case, provider, _, _ in shown[:3]] == [
        ("v1024-b1-n1", "hf-dense"), ("v1024-b1-n1", "ours-dense"), ("v1024-b1-n1", "ours")
    ]  # fmt: skip
    (gpu,) = re.findall(r"e2e device: [^>]* -->([^<]*)<!-- end -->", before)
    commits = set()
    for case, provider, conditions, milliseconds in shown:
        phase = re.findall(r"phase=(\w+)", conditions)[0]
        rows = [
            row for row in tables.read_e2e()
            if (row["case"], row["provider"], row["phase"], row["metric"]) == (case, provider, phase, "ms")
            and row["model"].startswith("7b ")
        ]  # fmt: skip
        latest = max(rows, key=lambda row: row["timestamp"])
        assert milliseconds == f"{float(latest['p50']):.0f}"
        assert latest["gpu"] == gpu
        commits.add(latest["commit"])
    assert len(commits) == 1


def test_no_figure_begins_a_line():
    """Markdown would take the marker for the beginning of a block of HTML, and end the sentence there."""
    for document in DOCUMENTS:
        assert not re.findall(r"^<!-- \w+ (?:figure|ratio|device):", read(document), flags=re.MULTILINE)


def test_a_figure_follows_its_row(tables, monkeypatch):
    shared = {"case": "c", "phase": "total", "metric": "ms", "timestamp": "1", "commit": "abc", "gpu": "G"}
    times = {"hf-dense": "50.4", "ours-dense": "20.2", "ours": "12.6"}
    rows = [{**shared, "provider": provider, "keep": "1.0", "p50": p50} for provider, p50 in times.items()]
    monkeypatch.setattr(tables, "read_e2e", lambda: rows)
    made = "takes <!-- e2e figure: case=c provider=ours phase=total -->13<!-- end --> ms"
    assert tables.with_tables(made.replace("13", "99")) == made
    with pytest.raises(ValueError, match="a figure needs one stored row, its filter finds 0"):
        tables.with_tables(made.replace("phase=total", "phase=vision"))
    with pytest.raises(ValueError, match="a figure needs one stored row, its filter finds 3"):
        tables.with_tables(made.replace(" provider=ours", ""))
    monkeypatch.setattr(tables, "stored_rows", lambda: [{"selector": "span", "retained": "98.76"}])
    made = "retains <!-- accuracy figure: selector=span -->98.8<!-- end --> %"
    assert tables.with_tables(made.replace("98.8", "")) == made
    with pytest.raises(ValueError, match="its filter finds 0"):
        tables.with_tables(made.replace("span", "grid"))


def test_a_table_of_memory(tables):
    shared = {
        "case": "c",
        "metric": "bytes",
        "phase": "total",
        "keep": "1.0",
        "timestamp": "2",
        "model": "7b",
        "dtype": "f16",
    }
    shared |= {"gpu": "G", "torch": "t", "triton": "r", "transformers": "h", "commit": "abc"}
    rows = [
        {**shared, "provider": "hf-dense", "p50": "1.84e10"},
        {**shared, "provider": "ours", "keep": "0.25", "p50": "1.9e10"},
        {**shared, "provider": "ours", "keep": "0.25", "p50": "5e10", "timestamp": "1"},
        {**shared, "provider": "hf-dense", "case": "d", "p50": "2e9"},
        {**shared, "provider": "hf-dense", "metric": "ms", "p50": "3"},
    ]
    lines = tables.memory_table(rows).splitlines()
    assert lines[0] == "| case | hf-dense | ours 0.25 |"
    assert lines[2:4] == ["| c | 18.4 | 19.0 |", "| d | 2.0 | – |"]
    assert "abc" in lines[-1]
    assert tables.memory_table([]).startswith("No rows yet")


def test_no_measurement_is_written_by_hand():
    """In the README's sentences, what has a unit of time or a percentage stands in a marker."""
    text = re.sub(r"(?:figure|ratio|device): .*?-->[^<]*<!-- end -->", "", read(ROOT / "README.md"), flags=re.DOTALL)
    text = re.sub(r"<!-- families: .*?<!-- end of families", "", text, flags=re.DOTALL)
    sentences = "\n".join(
        line for line in text.splitlines() if "roofline bound" not in line and not line.startswith("| v")
    )
    assert re.findall(r"\d[\d.]* ?(?:ms\b|%|×|times\b)", sentences) == []


def test_the_strongest_published_methods_stand_beside_ours(tables):
    """In README and page, of smol at a quarter: the default, the three best that others published, a random draw."""
    rows = tables.chosen(tables.stored_rows(), "model=smol options= target_layers=default")
    retained = {cell: mean_retained(found) for cell, found in of_suites(rows).items() if cell[1] == "0.25"}
    own = {"random", "grid", "downsample", *(name for name in SELECTORS if name.startswith("span"))}
    assert {name for name, *_ in retained} - {"downsample"} == set(SELECTORS)
    published = sorted((cell for cell in retained if cell[0] not in own), key=retained.__getitem__, reverse=True)
    for name in ("README.md", "docs/accuracy.md"):
        table = re.search(r"<!-- families: model=smol.*?<!-- end of families", read(ROOT / name), re.DOTALL)[0]
        assert "| average | documents | chat | charts | screens | whole | scenes | grounds |" in table
        shown = set(re.findall(r"^\| ([a-z-]+) \| 0\.25 ", table, re.MULTILINE))
        assert {DEFAULT, "random", *(name for name, *_ in published[:3])} <= shown, name
        assert f"| {DEFAULT} | adaptive |" in table, "the call without options"


def test_the_documents_say_what_is_lost_where_the_vision_tower_is_pruned():
    """On crowded and full pictures, and in the quick start where to read it."""
    sentence = "accuracy figure: run=grounds-bundled-22ff0e93 selector=span task="
    for name in ("docs/engine.md", "docs/material.md"):
        assert {"collage", "photograph", "crowded"} <= set(re.findall(f"{sentence}(\\w+)", read(ROOT / name)))
    for paragraph in read(ROOT / "docs" / "quickstart.md").split("\n\n"):
        assert "vision_keep" not in paragraph or "(engine.md#less-work-in-the-vision-tower)" in paragraph


def test_a_choice_that_reads_no_attention_is_told_from_its_budget():
    """Span reads none for the choice, and does for how many, with ``keep`` unset."""
    n_told = 0
    for name in ("README.md", "docs/algorithm.md", "docs/faq.md", "docs/engine.md", "docs/selectors.md"):
        for paragraph in read(ROOT / name).split("\n\n"):
            if re.search(r"reads no attention|no attention is read", paragraph, re.IGNORECASE):
                assert "keep" in paragraph, paragraph
                n_told += 1
    assert n_told >= 2


def test_every_full_ground_is_in_a_table():
    """Photographs, noise and clutter among them: dense, the default, the strongest published method, a random draw."""
    text = read(ROOT / "docs" / "material.md")
    table = re.search(r"<!-- accuracy: run=grounds-.*?<!-- end of accuracy", text, re.DOTALL)[0]
    (heads,) = re.findall(r"^\| selector \|.*\| average \| (.*) \|$", table, re.MULTILINE)
    assert set(heads.split(" | ")) == set(GROUNDS) >= {"photograph", "noise", "clutter"}
    assert {"dense", DEFAULT, "mmtok", "random"} <= set(re.findall(r"^\| ([a-z-]+) \|", table, re.MULTILINE))


def test_accuracy_is_claimed_of_the_small_model_only():
    for name in ("README.md", "docs/accuracy.md", "docs/ablation.md", "docs/selectors.md", "docs/faq.md"):
        text = " ".join(prose(ROOT / name).split()).lower()
        assert "small model" in text or "small trained model" in text, name
    assert "Not measured on any real checkpoint" in read(ROOT / "README.md")
    assert "Nothing on this page" in read(ROOT / "docs" / "accuracy.md")


def n_lines(file, name):
    """Lines of what a file says of a family: its function, its row in a dictionary, its description."""
    found = []
    for node in ast.walk(ast.parse(read(file))):
        if isinstance(node, ast.FunctionDef) and node.name == f"_{name}":
            found.append(node.end_lineno - node.lineno + 1)
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.args[0]) == f"('{name}',)":
            found.append(node.end_lineno - node.lineno + 1)
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            rows = [(key, value) for key, value in pairs if isinstance(key, ast.Constant) and key.value == name]
            found += [value.end_lineno - key.lineno + 1 for key, value in rows]
    return sorted(found)


def test_a_family_is_as_many_lines_as_the_page_says():
    page, package, toys = read(ROOT / "docs/adding_a_model.md"), ROOT / "src/sparsevlm", ROOT / "tests/toys"
    said = re.search(
        r"\(`lighton_ocr`\) is (\d+) lines .*? a function of (\d+) lines, and rows of (\d+) and of (\d+)\.",
        page,
        re.DOTALL,
    )
    of_package, of_function, *of_rows = map(int, said.groups())
    assert n_lines(package / "models/registry.py", "lighton_ocr") == [of_package]
    assert n_lines(toys / "sized.py", "lighton_ocr") == sorted([of_function, of_rows[0]])
    assert n_lines(toys / "processors.py", "lighton_ocr") == [of_rows[1]]
    named = [file.name for file in package.rglob("*.py") if re.search("light_?on", read(file), re.IGNORECASE)]
    assert named == ["registry.py"]
