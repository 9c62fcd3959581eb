"""The published support matrix is that of its rows, and holds what is promised."""

from __future__ import annotations

import pytest

from benchmark import support_matrix
from sparsevlm.models.registry import FAMILIES
from toys import FAMILIES as TOYS
from toys import tiny_model

PROMISED_CLASSES = (
    "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3VLMoe", "InternVL", "Llava", "LlavaNext", "LlavaOnevision", "SmolVLM",
    "Idefics3", "Mistral3", "Glm4v", "Gemma3", "PaliGemma", "Qwen3_5", "Qwen2_5OmniThinker",
)  # fmt: skip
PROMISED_MODES = ("greedy", "sampling", "beams", "left-padded batch", "two images", "second turn")


@pytest.fixture(scope="module")
def rows():
    return support_matrix.read()


def test_the_page_is_that_of_the_rows(rows):
    assert support_matrix.MATRIX.with_suffix(".md").read_text(encoding="utf-8") == support_matrix.page(rows)


def test_every_family_is_there(rows):
    found = {row["class"] for row in rows}
    assert {family.class_names[0] for family in FAMILIES} <= found
    assert {type(tiny_model(family)).__name__ for family in TOYS} == found
    assert {row["family"] for row in rows} == set(TOYS)


def test_rows_replace_those_of_the_same_family_and_version(tmp_path, monkeypatch):
    def row(family, version, path):
        own = dict.fromkeys(support_matrix.COLUMNS, "x") | {"family": family, "transformers": version, "path": path}
        return ",".join(own.values()) + "\n"

    before = [row("a", "5.1.0", "hooks"), row("a", "5.2.0", "hooks"), row("b", "5.1.0", "hooks")]
    monkeypatch.setattr(support_matrix, "MATRIX", tmp_path / "matrix.csv")
    support_matrix.MATRIX.write_text("".join([",".join(support_matrix.COLUMNS) + "\n", *before]))
    (tmp_path / "rows.csv").write_text(row("a", "5.1.0", "engine") + row("c", "5.1.0", "hooks"))
    support_matrix.main([str(tmp_path / "rows.csv")])
    found = [(row["family"], row["transformers"], row["path"]) for row in support_matrix.read(support_matrix.MATRIX)]
    assert found == [
        ("a", "5.1.0", "engine"), ("a", "5.2.0", "hooks"), ("b", "5.1.0", "hooks"), ("c", "5.1.0", "hooks"),
    ]  # fmt: skip


def test_what_is_promised_is_supported(rows):
    """Where transformers itself does not answer, there is nothing to be equal to."""
    status = {}  # of all families of a class
    for row in rows:
        cell = (row["class"], row["mode"], row["attention"], row["transformers"])
        status.setdefault(cell, set()).add(row["status"])
    versions = {row["transformers"] for row in rows}
    assert len(versions) == 2
    for name in PROMISED_CLASSES:
        for mode in PROMISED_MODES:
            for attention in ("eager", "sdpa"):
                for version in versions:
                    found = status[f"{name}ForConditionalGeneration", mode, attention, version]
                    assert found <= {support_matrix.SUPPORTED, support_matrix.UNKNOWN}, (name, mode, attention, version)


def test_a_cell_tells_attentions_and_versions_apart():
    def row(attention, version, path, status="supported", reason=""):
        own = {"path": path, "status": status, "reason": reason, "transformers": version, "attention": attention}
        return {"family": "a", "class": "AForConditionalGeneration", "mode": "greedy", **own}

    one = [row("sdpa", "5.1.0", "engine"), row("eager", "5.1.0", "engine")]
    assert "| A | engine |" in support_matrix.page(one)
    differs = [*one, row("flash", "5.1.0", "hooks")]
    assert "| A | engine: sdpa, eager<br>hooks: flash |" in support_matrix.page(differs)
    second = {**row("sdpa", "5.1.0", "hooks"), "family": "a2"}
    page = support_matrix.page([*one, second])
    assert "| A (`a`) | engine |" in page
    assert "| A (`a2`) | hooks |" in page
    refused = [row("sdpa", "5.1.0", "engine"), row("sdpa", "5.2.0", "", "refused", "too new")]
    page = support_matrix.page(refused)
    assert "| A | engine: sdpa 5.1.0<br>refused (1): sdpa 5.2.0 |" in page
    assert "1. too new" in page
