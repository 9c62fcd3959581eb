"""One folder per run, named by its configuration, that refuses to mix two runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..settings import EvalConfig


class RunFolder:
    """``<out>/<title>-<digest of the configuration>``.

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
        """Keep a second run out; a killed one does not keep the lock.

        Raises
        ------
        ValueError
            If another process is running in this folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"cannot write to folder {self.path}: a file is in its place.") from error
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{self.path} is in use by another run of the same configuration; wait for it, or end it."
            ) from error
        try:
            yield
        finally:
            lock.release()

    def open(self, config: EvalConfig, versions: dict[str, str], *, resume: bool) -> None:
        """Go on with what the folder holds, or start anew.

        Raises
        ------
        ValueError
            If the folder holds a run of another configuration or of other versions; the message names what differs.
        """
        mine = {"config": config.to_dict(), "versions": versions}
        if not resume:
            for file in self.predictions.glob("*.json*"):
                file.unlink()
        elif self._config_file.is_file():
            found = self._read_config()
            if differences := _differences(found, mine):
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
        aside.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
        aside.replace(self._config_file)

    def _read_config(self) -> dict[str, Any]:
        try:
            found = json.loads(self._config_file.read_text(encoding="utf-8"))
            return {"config": dict(found["config"]), "versions": dict(found["versions"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._config_file} is damaged; start anew with --no-resume, or write elsewhere with --out."
            ) from error


def _differences(found: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """What differs between two stored configurations, in words."""
    lines = []
    for part in ("config", "versions"):
        for name in sorted({*found[part], *mine[part]}):
            there, here = found[part].get(name), mine[part].get(name)
            if there != here:
                lines.append(f"{name} is {there!r} there and {here!r} now")
    return lines
