"""The command line with the packages of its extra, and without."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = "from sparsevlm.cli import main; main()"
MODULE = "import runpy; runpy.run_module('sparsevlm', run_name='__main__', alter_sys=True)"


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
@pytest.mark.parametrize("start", [COMMAND, MODULE])
def test_without_the_extra_it_names_the_remedy(start, missing):
    done = run(f"import sys; sys.modules[{missing!r}] = None; {start}", "demo")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: the command line needs {missing}, ")
    assert '`pip install ".[cli]"`' in line


@pytest.mark.parametrize("arguments", [["--version"], ["run", "--help"], ["run", "--nonsense"], []])
def test_the_module_is_the_command(arguments):
    command = run(COMMAND, *arguments)
    module = subprocess.run(
        [sys.executable, "-m", "sparsevlm", *arguments], capture_output=True, text=True, check=False
    )
    assert (module.returncode, module.stdout, module.stderr) == (command.returncode, command.stdout, command.stderr)
    assert "sparsevlm" in command.stdout + command.stderr


def test_the_page_without_gradio_names_its_extra():
    done = run(f"import sys; sys.modules['gradio'] = None; {COMMAND}", "explore")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the page needs gradio, which the extra explore brings: run `pip install")
