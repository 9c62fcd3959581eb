"""The README's figures are those of the stored rows."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_stored_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmark import tables

    text = tables.README.read_text(encoding="utf-8")
    assert tables.with_table(text) == text
    assert all(row["commit"] and "dirty" not in row["commit"] for row in tables.rows())
    assert all(row["command"].startswith("python -m benchmark.") for row in tables.rows())
