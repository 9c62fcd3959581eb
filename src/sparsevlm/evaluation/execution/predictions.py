"""Stored predictions: a JSON line per row and setting, safe against a kill at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Prediction = dict[str, Any]
# (task, id) -> prediction, by name of the setting.
Stored = dict[str, dict[tuple[str, str], Prediction]]


class PredictionStore:
    """Predictions of one run folder.

    Every setting has a file; with several workers each worker has one of its own, so that no two processes write to
    the same. A kill can tear the last line of a file: it is cut off before anything is appended.

    Parameters
    ----------
    folder : Path
    worker : int
        Index of the worker that :meth:`append` writes for.
    """

    def __init__(self, folder: Path, worker: int = 0) -> None:
        self.folder = folder
        self.worker = worker
        self._repaired: set[Path] = set()

    def append(self, setting: str, predictions: Iterable[Prediction]) -> None:
        """Appends predictions of a setting in a single write."""
        text = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
        if not text:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / (f"{setting}.jsonl" if self.worker == 0 else f"{setting}.worker{self.worker}.jsonl")
        if file not in self._repaired:
            _cut_torn_line(file)
            self._repaired.add(file)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(text)

    def read(self) -> Stored:
        """Reads the predictions of all workers; of a row that was tried again, the last try.

        Raises
        ------
        ValueError
            If a line that is not the last of its file is damaged; the message names it.
        """
        stored: Stored = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            lines = file.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or a torn line
                try:
                    prediction = json.loads(line)
                    key = (prediction["task"], prediction["id"])
                    rows = stored.setdefault(prediction["setting"], {})
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"line {number} of {file} is damaged; delete the line, and the row will be run again."
                    ) from error
                if "error" not in prediction or key not in rows:
                    rows[key] = prediction
        return stored


def _cut_torn_line(file: Path) -> None:
    if not file.exists():
        return
    with file.open("r+b") as lines:
        content = lines.read()
        if content and not content.endswith(b"\n"):
            lines.truncate(content.rfind(b"\n") + 1)
