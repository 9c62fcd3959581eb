"""The example of a client, and what the page says, against a server."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

ROOT = Path(__file__).parents[2]


def test_the_example(live, monkeypatch, capsys):
    monkeypatch.setenv("SERVER", f"http://127.0.0.1:{live.port}/v1")
    runpy.run_path(str(ROOT / "examples" / "client.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "354\n64.0 of 256 visual tokens, path plain\n" in printed
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


def test_the_shell_commands_of_the_page(live, tmp_path):
    """The answer whole and as a stream, each with what was kept."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^<!-- not run: needs a server -->\n```bash\n(.*?)^```", page, re.DOTALL | re.M)
    (tmp_path / "page.sh").write_text(block.replace("http://127.0.0.1:8000", f"http://127.0.0.1:{live.port}"))
    folders = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))  # its `python` is this one
    shell = {**os.environ, "PATH": folders, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["bash", "-e", "page.sh"], cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, _, stream = done.stdout.partition("data: ")
    answer = json.loads(whole)
    assert answer["choices"][0]["message"]["content"] == "354"
    *chunks, end = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    chunks = [json.loads(chunk) for chunk in chunks]
    assert end == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "354"
    assert answer["sparsevlm"]["visual_tokens_kept"] == chunks[-1]["sparsevlm"]["visual_tokens_kept"] == 64.0


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
