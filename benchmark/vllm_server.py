"""vLLM's own OpenAI server of a model with random weights, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmark.vllm_setup import dtype, environment
from benchmark.vllm_timed_choice import FOLDER, SWITCH, TIMES

NAME = "model"
_ROOT = Path(__file__).parent.parent
# vLLM finds plugins by entry points, also where the package is not installed.
_ENTRY_POINTS = """[vllm.general_plugins]
sparsevlm = sparsevlm.plugins.vllm:register
timed_choice = benchmark.vllm_timed_choice:register
"""
_TAIL = 6000


class Server:
    """A server that is stopped at the end of a ``with``.

    Parameters
    ----------
    model : Path
        Folder of a checkpoint without weights.
    place : Path
        Folder for its log and what it shares with this process.
    options : sequence of str
        Of its command line, behind those that all servers have.
    seconds : float
        In which it has to be ready.

    Raises
    ------
    RuntimeError
        On entering, if it is not. The end of its log goes to the error stream.
    """

    def __init__(self, model: Path, place: Path, options: Sequence[str], seconds: float) -> None:
        self._model, self._options, self._seconds = model, options, seconds
        self._place = place
        self._log = place / "log.txt"
        self.address = f"http://127.0.0.1:{_free_port()}"

    def __enter__(self) -> Server:
        with self._log.open("w", encoding="utf-8") as lines:
            self._process = subprocess.Popen(
                self._command(), env=self._environment(), stdout=lines, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def _command(self) -> list[str]:
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model),
            "--served-model-name", NAME, "--load-format", "dummy", "--dtype", dtype(), "--seed", "0",
            "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2], "--uvicorn-log-level", "warning",
        ]  # fmt: skip
        if not torch.cuda.is_available():
            command += ["--enforce-eager", "--block-size", "32", "--skip-mm-profiling"]
        return [*command, *self._options]

    def _environment(self) -> dict[str, str]:
        packages = self._place / "packages"
        folder = packages / "sparsevlm_load-0.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsevlm-load\nVersion: 0\n", encoding="utf-8")
        (folder / "entry_points.txt").write_text(_ENTRY_POINTS, encoding="utf-8")
        given = environment()
        paths = [given["PYTHONPATH"]] if given.get("PYTHONPATH") else []
        given["PYTHONPATH"] = os.pathsep.join([*paths, str(_ROOT), str(_ROOT / "src"), str(packages)])
        return {**given, FOLDER: str(self._place)}

    def _wait(self) -> None:
        end = time.monotonic() + self._seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
            code = self._process.poll()
            if code is not None or time.monotonic() > end:
                self.show_log()
                reason = f"in {self._seconds:.0f} s" if code is None else f"exit code {code}"
                raise RuntimeError(f"the server was not ready: {reason}")

    def _stop(self) -> None:
        """The processes that it has started end with it, and with them their memory on a device."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def show_log(self) -> None:
        """Print the end of what the server has written to the error stream."""
        print(self._log.read_text(encoding="utf-8", errors="replace")[-_TAIL:], file=sys.stderr)

    @contextlib.contextmanager
    def timed_choices(self) -> Iterator[None]:
        """Within this the engine waits for its device around each choice, and writes down how long that took."""
        (self._place / TIMES).unlink(missing_ok=True)
        (self._place / SWITCH).touch()
        try:
            yield
        finally:
            (self._place / SWITCH).unlink()

    def choices(self) -> list[tuple[float, int]]:
        """Milliseconds of the choices that were timed last, and of how many images each was."""
        file = self._place / TIMES
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [(milliseconds, n_images) for milliseconds, n_images in map(json.loads, lines)]


def takes_request_options() -> list[str]:
    """Options under which a server takes the plugin's options of a request; older versions always do."""
    try:
        from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs
    except ImportError:
        from vllm.entrypoints.openai.cli_args import BaseFrontendArgs
    is_asked = "trust_request_mm_kwargs" in BaseFrontendArgs.__dataclass_fields__
    return ["--trust-request-mm-kwargs"] if is_asked else []


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
