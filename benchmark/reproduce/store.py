"""Result files of the runs, one for each setting and task, with what their figures depend on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsevlm.evaluation.execution.run_folder import locked_folder, write_whole

Fingerprint = dict[str, Any]
UNFINISHED = "the process ended before the task did"


@dataclass(frozen=True)
class Result:
    """What lmms-eval found for one task under one setting.

    Attributes
    ----------
    fingerprint : dict
        Everything that the figures depend on.
    metrics : dict of str to float
        As lmms-eval aggregates them.
    n : int
        Rows.
    tokens : dict of str to float
        Per row: ``visual``, ``inputs`` and ``outputs``, averages over the decoder's layers.
    seconds : float
        Of the whole task, loading its data set included.
    origin : dict of str to str
        Batch size, processes, device and time.
    """

    fingerprint: Fingerprint
    metrics: dict[str, float]
    n: int
    tokens: dict[str, float]
    seconds: float
    origin: dict[str, str] = field(default_factory=dict)


class Store:
    """Folder of results: ``results/<setting>/<task>.json``, with the answers in a ``.jsonl`` file beside it.

    Parameters
    ----------
    folder : Path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against a second run; a killed run does not keep the lock.

        Raises
        ------
        ValueError
            If another run is in this folder, or it cannot be made.
        """
        with locked_folder(self.folder):
            yield

    def read(self, setting: str, task: str) -> Result | None:
        """The result of a task, ``None`` where there is none or half of one."""
        try:
            return Result(**json.loads(self.file(setting, task).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def samples(self, setting: str, task: str) -> list[dict[str, Any]]:
        """Rows of a task: ``id``, ``answer``, ``target`` and ``scores`` by metric."""
        lines = self.file(setting, task).with_suffix(".jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in lines.splitlines()]

    def write(self, setting: str, task: str, result: Result, samples: Sequence[Mapping[str, Any]]) -> None:
        """Stores a result; the file that counts comes last and in one step, so that a kill leaves no half of it."""
        file = self.file(setting, task)
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_whole(file.with_suffix(".jsonl"), lines)
        write_whole(file, json.dumps(vars(result), indent=1) + "\n")
        self.error_file(setting, task).unlink(missing_ok=True)

    def begin(self, setting: str, task: str) -> None:
        """Notes that a task has begun, which is what is left of it if its process ends."""
        self.fail(setting, task, UNFINISHED)

    def fail(self, setting: str, task: str, reason: str) -> None:
        """Stores why a task has no result."""
        file = self.error_file(setting, task)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(reason.rstrip() + "\n", encoding="utf-8")

    def failure(self, setting: str, task: str) -> str | None:
        """Why a task has no result, ``None`` if it was not tried."""
        file = self.error_file(setting, task)
        return file.read_text(encoding="utf-8").strip() if file.is_file() else None

    def forget_failure(self, setting: str, task: str) -> None:
        """Makes way for another try."""
        self.error_file(setting, task).unlink(missing_ok=True)

    def file(self, setting: str, task: str) -> Path:
        """Where the result of a task is."""
        return self.folder / "results" / setting / f"{task}.json"

    def error_file(self, setting: str, task: str) -> Path:
        """Where the reason is that a task has no result."""
        return self.file(setting, task).with_suffix(".error.txt")


def check_same(stored: Result, current: Fingerprint, file: Path) -> None:
    """Refuses a result of another kind.

    Raises
    ------
    ValueError
        With what differs.
    """
    differences = [
        f"{name} is {stored.fingerprint.get(name)!r} there and {current.get(name)!r} now"
        for name in sorted({*stored.fingerprint, *current})
        if stored.fingerprint.get(name) != current.get(name)
    ]
    if differences:
        raise ValueError(
            f"{file} is a result of another kind: {'; '.join(differences)}. Write elsewhere with --out, or move the "
            "file away to have it made anew."
        )
