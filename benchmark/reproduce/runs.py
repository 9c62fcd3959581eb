"""Runs what is missing of a table, setting by setting, each in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.reproduce.child import Job
from benchmark.reproduce.plan import N_QUESTIONS, Setting
from benchmark.reproduce.store import Fingerprint, Store, check_same

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Options:
    """How the tasks are run.

    Attributes
    ----------
    shared : dict
        Arguments of the plugin's model that all settings have.
    include_path : Path or None
    limit : int or None
    processes : int
        Above one, each has a copy of the model on a device of its own.
    download : bool
        Whether missing data sets may be fetched.
    """

    shared: dict[str, Any]
    include_path: Path | None
    limit: int | None
    processes: int
    download: bool

    @property
    def launcher(self) -> list[str]:
        """Arguments of Python that start several processes: what ``accelerate launch`` starts, which without GPUs
        would make do with one."""
        if self.processes == 1:
            return []
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]

    def arguments(self, setting: Setting) -> dict[str, Any]:
        """Arguments of the plugin's model for a setting."""
        return {**self.shared, **setting.arguments}

    def command(self, setting: Setting, tasks: Sequence[str]) -> str:
        """The same as a command of lmms-eval."""
        arguments = ",".join(f"{name}={value}" for name, value in self.arguments(setting).items())
        command = ["python", *self.launcher, "-m", "lmms_eval", "--model", "sparsevlm", "--model_args", arguments]
        command += ["--tasks", ",".join(tasks), "--log_samples"]
        command += ["--limit", str(self.limit)] if self.limit else []
        command += ["--include_path", str(self.include_path)] if self.include_path else []
        return shlex.join(command)


def missing_tasks(
    store: Store, settings: Sequence[Setting], fingerprints: Mapping[str, Mapping[str, Fingerprint]]
) -> dict[str, list[str]]:
    """Tasks without a result, by setting.

    Raises
    ------
    ValueError
        If there is a result of another kind.
    """
    missing: dict[str, list[str]] = {}
    for setting in settings:
        for task, current in fingerprints[setting.name].items():
            stored = store.read(setting.name, task)
            if stored is None:
                missing.setdefault(setting.name, []).append(task)
            else:
                check_same(stored, current, store.file(setting.name, task))
    return missing


def run_setting(
    store: Store,
    setting: Setting,
    fingerprints: Mapping[str, Fingerprint],
    options: Options,
    start: Callable[[list[str], dict[str, str]], int] | None = None,
) -> None:
    """Runs the tasks of one setting, the rest of them again in another process where one ends amid a task.

    Parameters
    ----------
    store : Store
    setting : Setting
    fingerprints : mapping
        By task; those that are to run.
    options : Options
    start : callable, optional
        ``start(command, environment)`` runs a process and returns its exit status.
    """
    for task in fingerprints:
        store.forget_failure(setting.name, task)
    left = dict(fingerprints)
    while left:
        status = (start or _start)(*_process(store, setting, left, options))
        tried = [
            task
            for task in left
            if store.failure(setting.name, task) is not None or store.read(setting.name, task) is not None
        ]
        if not tried:  # as where the weights do not fit
            for task in left:
                store.fail(setting.name, task, f"the process ended with status {status} before any task began")
            return
        left = {task: one for task, one in left.items() if task not in tried}


def _process(
    store: Store, setting: Setting, tasks: Mapping[str, Fingerprint], options: Options
) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process that runs tasks."""
    place = None if options.include_path is None else str(options.include_path.resolve())
    folder = str(store.folder.resolve())
    job = Job(folder, setting.name, options.arguments(setting), dict(tasks), place, options.limit, parent=os.getpid())
    file = store.folder / "job.json"
    job.write(file)
    command = [sys.executable, *options.launcher, "-m", "benchmark.reproduce.child"]
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if not options.download:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return [*command, str(file.resolve())], environment


def _start(command: list[str], environment: dict[str, str]) -> int:
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def estimate(store: Store, missing: Mapping[str, Sequence[str]], limit: int | None) -> tuple[int | None, float | None]:
    """Questions that are left, and the seconds that they take by what is stored of the same folder.

    Each is ``None`` where it is not known: of tasks whose number of questions is not, and where nothing is stored.
    """
    n_left, seconds = 0, 0.0
    stored = [(file.parent.name, file.stem) for file in (store.folder / "results").glob("*/*.json")]
    done = [one for setting, task in stored if (one := store.read(setting, task)) is not None]
    n_done = sum(one.n for one in done)
    for task in (task for tasks in missing.values() for task in tasks):
        known = next((one.n for setting, name in stored if name == task and (one := store.read(setting, name))), None)
        n_rows = known or N_QUESTIONS.get(task)
        if n_rows is None:
            return None, None
        n_left += min(n_rows, limit or n_rows)
    if n_done:
        seconds = n_left * sum(one.seconds for one in done) / n_done
    return n_left, seconds if n_done else None
