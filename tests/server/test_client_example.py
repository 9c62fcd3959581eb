"""The example of a client, and what the page says, against a server."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

ROOT = Path(__file__).parents[2]


def test_the_example(live, monkeypatch, capsys):
    monkeypatch.setenv("SERVER", f"http://127.0.0.1:{live.port}/v1")
    runpy.run_path(str(ROOT / "examples" / "client.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "354\n63.5 of 256 visual tokens, path plain\n" in printed
    assert "blue 354, orange 780" in printed
    assert re.search(r"\n\d+ prompt tokens\n", printed)


def test_the_code_of_the_page(live, capsys):
    """Blocks that ask a server are not run where there is none; here there is."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.M)
    namespace = {}
    for block in blocks[:2]:
        exec(block.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{live.port}"), namespace)
    assert capsys.readouterr().out.startswith("354 ")


def test_the_defaults_of_the_page_are_those_of_the_command():
    from typer.testing import CliRunner

    from sparsevlm.cli import app

    monkey = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    shown = CliRunner().invoke(app, ["serve", "--help"], env=monkey).output
    for name in re.findall(r"`(--[a-z-]+)", (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")):
        assert name in shown or name == "--help", name


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    from typer.testing import CliRunner

    from sparsevlm.cli import app

    monkeypatch.setattr("sparsevlm.cli.serve.find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve", "--model", "bundled"])
    assert done.exit_code == 2
    assert 'pip install ".[server]"' in " ".join(done.output.split())
