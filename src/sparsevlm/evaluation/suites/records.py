"""Rows of JSON lines and parquet files, with pictures read only when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes
    ----------
    where : str
        Names the row in messages.
    number : int
        Line of a JSON lines file from 1, or row of a parquet file from 0.
    values : dict
        Every column but the pictures.
    images : callable
        Returns what the columns :data:`IMAGE_COLUMNS` hold.
    folder : Path
        What relative picture paths start from.
    problem : str or None
        Why the row cannot be used.
    """

    where: str
    number: int
    values: dict[str, Any]
    images: Callable[[], dict[str, Any]]
    folder: Path
    problem: str | None = None


def read_records(file: Path) -> list[Record]:
    """All rows of a ``.jsonl`` or ``.parquet`` file.

    Raises
    ------
    ValueError
        If the file is neither, or holds no rows.
    ModuleNotFoundError
        For parquet without ``pyarrow``; the message has the pip line.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise ValueError(f"{file} must end in {' or '.join(readers)}.")
    records = list(readers[file.suffix](file))
    if not records:
        raise ValueError(f"{file} holds no rows.")
    return records


def _read_jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_record(file, number, line)


def _json_record(file: Path, number: int, line: bytes) -> Record:
    where, problem, values = f"line {number} of {file.name}", None, {}
    try:
        values = json.loads(line)
    except ValueError as error:
        problem = f"is not JSON ({error}); write one object a line"
    if not isinstance(values, dict):
        problem, values = "is no JSON object; write one object a line", {}
    images = {name: values.pop(name) for name in IMAGE_COLUMNS if name in values}
    return Record(where, number, values, lambda: images, file.parent, problem)


def _read_parquet(file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "parquet files need pyarrow: pip install 'pyarrow>=18' (part of the extra eval)."
        ) from error
    try:
        opened = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file: {error}") from error
    names = opened.schema_arrow.names
    columns = [name for name in names if name not in IMAGE_COLUMNS]
    image_columns = [name for name in names if name in IMAGE_COLUMNS]

    # Rows are asked for in order, so that each group is read once; pictures of a whole group fit, as its writer had it.
    @lru_cache(maxsize=1)
    def images_of(group: int) -> list[dict[str, Any]]:
        return opened.read_row_group(group, columns=image_columns).to_pylist()

    number = 0
    for group in range(opened.num_row_groups):
        # Without columns, a table forgets its number of rows.
        n_rows = opened.metadata.row_group(group).num_rows
        rows = opened.read_row_group(group, columns=columns).to_pylist() if columns else [{}] * n_rows
        for offset, values in enumerate(rows):
            images = _at(images_of, group, offset) if image_columns else dict
            yield Record(f"row {number} of {file.name}", number, values, images, file.parent)
            number += 1


def _at(images_of: Callable[[int], list[dict[str, Any]]], group: int, offset: int) -> Callable[[], dict[str, Any]]:
    return lambda: images_of(group)[offset]
