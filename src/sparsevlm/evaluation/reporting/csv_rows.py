"""Results as rows of CSV files: one beside the predictions, one that collects many runs."""

from __future__ import annotations

import csv
import math
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from .results import Result

COLUMNS = (
    *("model", "suite", "task", "selector", "keep", "avg_tokens", "score", "dense_score", "retained", "ci_low"),
    *("ci_high", "n", "seed", "commit", "n_failed", "n_visual", "tflops", "latency_ms", "mean_iou", "path"),
    *("target_layers", "options", "batch", "workers", "device", "dtype", "torch", "transformers", "weights", "data"),
    *("timestamp", "command", "run"),
)
_PLACES = {"score": 4, "dense_score": 4, "mean_iou": 4, "tflops": 6}


def csv_rows(results: Sequence[Result], origin: dict[str, Any]) -> list[dict[str, str]]:
    """Rows in :data:`COLUMNS`; what is not a number is empty.

    Parameters
    ----------
    results : sequence of Result
    origin : dict
        The columns that all rows share.
    """
    return [{name: _text(name, {**vars(result), **origin}[name]) for name in COLUMNS} for result in results]


def write_rows(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write a CSV file, in one step as far as others can see."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")  # no other process writes to the same
    try:
        # Escaped: what the user typed, which is one of the columns, may be no UTF-8.
        with aside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as out:
            writer = csv.DictWriter(out, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def append_rows(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """Add rows to a CSV file; rows that the same run left there before are replaced.

    Several runs may do so at once: a lock beside the file lets one after the other.
    """
    runs = {row["run"] for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        write_rows(file, [*(row for row in read_rows(file) if row["run"] not in runs), *rows])


def check_target(file: Path) -> None:
    """Refuse a file that rows cannot be added to, before there are any.

    Raises
    ------
    ValueError
        If it has other columns, or cannot be written; the message has the remedy.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
        read_rows(file)
    except OSError as error:
        raise ValueError(f"rows cannot be added to {file} ({error}); name another file.") from error


def read_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV file of this kind; none where there is no file, or an empty one.

    Raises
    ------
    ValueError
        If the file has other columns, or is no text.
    """
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        try:
            columns, rows = reader.fieldnames, list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{file} is no CSV file ({error}); name another file, or move it away.") from error
    if columns is None:
        return []
    if tuple(columns) != COLUMNS:
        raise ValueError(f"{file} has other columns than this version writes; name another file, or move it away.")
    return rows


def _text(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else str(round(value, _PLACES.get(name, 2)))
