"""Processes that begin where one has imported what takes long: several checks for the imports of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path


def run_forks(
    imports: str, codes: Sequence[str], *arguments: str, path: Path | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """What each code does and says as ``python -c code arguments``, behind imports that all of them share.

    Parameters
    ----------
    imports : str
        Code that is run once.
    codes : sequence of str
        One after the other, each in a fork of its own.
    *arguments : str
    path : Path, optional
        Folder in front of the search path.
    """
    paths = [path and str(path), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, "-c", f"import forks; forks.main({imports!r})", *arguments],
        input=json.dumps(codes),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [subprocess.CompletedProcess(code, *said) for code, said in zip(codes, json.loads(done.stdout), strict=True)]


def main(imports: str) -> None:
    """Import, run the codes that are read, and print what became of each."""
    codes = json.load(sys.stdin)
    exec(imports, {})
    sys.stdout.write(json.dumps([_run_fork(code) for code in codes]))


def _run_fork(code: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if not child:
            for file, own in ((stdout, 1), (stderr, 2)):
                os.dup2(file.fileno(), own)
            _run(code)
        _, status = os.waitpid(child, 0)
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode())
    return os.waitstatus_to_exitcode(status), *said


def _run(code: str) -> None:
    failed = 1
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        failed = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed)
