"""Run folders: one per configuration, locked while in use, never with two kinds of run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..settings import EvalConfig


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it against a second run; a killed run does not keep the lock.

    Raises
    ------
    ValueError
        If another process is running in this folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"cannot write to folder {folder}: a file is in its place.") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another run; wait for it, or end it.") from error
    try:
        yield
    finally:
        lock.release()


def write_whole(file: Path, text: str) -> None:
    """Writes a file in one step, so that a kill leaves no half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


class RunFolder:
    """Run folder ``<out>/<title>-<digest of the configuration>``.

    Parameters
    ----------
    out : Path
    config : EvalConfig
    title : str
        Suite and model.

    Attributes
    ----------
    path : Path
    predictions : Path
    """

    def __init__(self, out: Path, config: EvalConfig, title: str) -> None:
        name = re.sub(r"[^\w.-]+", "-", f"{title}-{config.digest()}")
        self.path = out / name
        self.predictions = self.path / "predictions"
        self._config_file = self.path / "config.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder against a second run; a killed run does not keep the lock.

        Raises
        ------
        ValueError
            If another process is running in this folder.
        """
        with locked_folder(self.path):
            yield

    def open(self, config: EvalConfig, versions: dict[str, str], *, resume: bool) -> None:
        """Resumes the run in the folder, or starts anew.

        Raises
        ------
        ValueError
            If the folder holds a run of another configuration or of other versions; the message names what differs.
        """
        current = {"config": config.to_dict(), "versions": versions}
        if not resume:
            for file in self.predictions.glob("*.json*"):
                file.unlink()
        elif self._config_file.is_file():
            stored = self._read_config()
            if differences := _differences(stored, current):
                raise ValueError(
                    f"{self.path} holds a run of another kind: {'; '.join(differences)}. Start it anew with "
                    "--no-resume, or keep it and write elsewhere with --out."
                )
            return
        elif any(self.predictions.glob("*.jsonl")):
            raise ValueError(
                f"{self.path} holds predictions but no config.json, so that nothing says what they are of. Start anew "
                "with --no-resume, or write elsewhere with --out."
            )
        # Written aside and moved, so that a kill leaves either no file or a whole one.
        aside = self._config_file.with_suffix(".tmp")
        aside.write_text(json.dumps(current, indent=1) + "\n", encoding="utf-8")
        aside.replace(self._config_file)

    def _read_config(self) -> dict[str, Any]:
        try:
            stored = json.loads(self._config_file.read_text(encoding="utf-8"))
            return {"config": dict(stored["config"]), "versions": dict(stored["versions"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._config_file} is damaged; start anew with --no-resume, or write elsewhere with --out."
            ) from error


def _differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Describes the differences between a stored and the current configuration."""
    lines = []
    for part in ("config", "versions"):
        for name in sorted({*stored[part], *current[part]}):
            there, here = stored[part].get(name), current[part].get(name)
            if there != here:
                lines.append(f"{name} is {there!r} there and {here!r} now")
    return lines
