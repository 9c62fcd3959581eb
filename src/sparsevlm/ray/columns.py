"""Columns of a batch: what is read of its rows, and what is added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..inputs.rows import check_question, row_image

if TYPE_CHECKING:
    import pyarrow
    from PIL import Image

# Of Arrow. One type each, so that files of a dataset agree also where a batch has no errors, or nothing else.
TYPES = {
    "answer": "string",
    "visual_tokens": "int64",
    "kept_tokens": "float64",
    "pruning_path": "string",
    "kv_bytes_dense": "float64",
    "kv_bytes_sparse": "float64",
    "seconds": "float64",
    "error": "string",
}


@dataclass(frozen=True)
class Asked:
    """What one row asks."""

    question: str
    images: list[Image.Image]


@dataclass(frozen=True)
class RowReader:
    """Reads pictures and questions from the rows of an Arrow table.

    Attributes
    ----------
    image_column : str or None
        ``None``: there are no pictures.
    question_column : str or None
        ``None``: every row asks ``question``.
    question : str or None
    image_folder : Path or None
        What relative paths start from.
    placeholders : tuple of str
        What no question may hold.
    """

    image_column: str | None
    question_column: str | None
    question: str | None
    image_folder: Path | None
    placeholders: tuple[str, ...]

    def check(self, table: pyarrow.Table) -> None:
        """Refuse a batch without the columns.

        Raises
        ------
        TypeError
            If it is no Arrow table.
        ValueError
            If a column is missing.
        """
        if not hasattr(table, "column_names"):
            raise TypeError(
                f"a batch must be a pyarrow.Table, got {type(table).__name__}: pass batch_format='pyarrow' to "
                "map_batches. In other formats Ray makes Python objects of nested columns."
            )
        for option in ("image_column", "question_column"):
            name = getattr(self, option)
            if name is not None and name not in table.column_names:
                raise ValueError(
                    f"the dataset has no column {name!r}, it has {', '.join(table.column_names)}; name another by "
                    f"{option}, or None where there is none."
                )

    def read(self, table: pyarrow.Table, number: int) -> Asked:
        """Picture and question of a row.

        Raises
        ------
        ValueError
            If the row has none that can be used.
        """
        try:
            return self._asked(table, number)
        except ValueError as error:
            raise ValueError(f"the row {error}") from error

    def _asked(self, table: pyarrow.Table, number: int) -> Asked:
        question = self.question
        if self.question_column is not None:
            question = table[self.question_column][number].as_py()
            check_question(question, self.question_column, self.placeholders)
        images = [] if self.image_column is None else self._images(table[self.image_column][number].as_py())
        return Asked(str(question), images)

    def _images(self, value: Any) -> list[Image.Image]:
        if isinstance(value, np.ndarray) and value.ndim == 4:
            value = list(value)
        listed = value if isinstance(value, (list, tuple)) else [value]
        if any(one is None or one == {"bytes": None, "path": None} for one in listed if not _is_array(one)):
            raise ValueError(
                f"has no image in the column {self.image_column!r}; leave the row out, or give an empty list where the "
                "question is about no image"
            )
        return [row_image(one, self.image_folder) for one in listed]


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def with_columns(table: pyarrow.Table, rows: Sequence[Mapping[str, Any]], prefix: str) -> pyarrow.Table:
    """The table with a column for each of :data:`TYPES` at its end; what a row does not have is null.

    Raises
    ------
    ValueError
        If a column is there already.
    """
    import pyarrow as pa

    if taken := [prefix + name for name in TYPES if prefix + name in table.column_names]:
        raise ValueError(
            f"the dataset has {', '.join(map(repr, taken))} already, and the answers would come under that name; "
            "choose an output_prefix, such as 'model_'."
        )
    for name, kind in TYPES.items():
        values = pa.array([row.get(name) for row in rows], pa.type_for_alias(kind))
        table = table.append_column(prefix + name, values)
    return table
