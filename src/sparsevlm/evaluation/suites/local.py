"""A dataset of one's own: a JSON lines or parquet file with pictures, questions and answers. Never the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ...inputs.decoding import check_is_file
from ...inputs.rows import check_question, row_image
from ..metrics.scores import check_answers, check_metric
from ..settings import AVERAGE
from .fingerprint import fingerprint
from .records import IMAGE_COLUMNS, Record, read_records
from .suite import Row, Sample, storable


class LocalSuite:
    """Rows of a file.

    Columns: ``image`` (a path relative to the file, or bytes, or the ``{"bytes", "path"}`` of a ``datasets`` image) or
    ``images`` (a list of them), ``question``, ``answers`` (a list) or ``answer``; optionally ``id`` (else the line or
    row number), ``task`` (else the file's name) and ``metric``.

    Parameters
    ----------
    file : Path
    metric : str
        For rows that name none.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file or metric, the file cannot be read, or a task has the name of the average.
    ModuleNotFoundError
        If a package for the file or for a metric is missing; the message has the pip line.
    """

    max_new_tokens = 32

    def __init__(self, file: Path, metric: str = "exact") -> None:
        check_is_file(file, f"dataset {file}", noun="a dataset", wanted="a .jsonl or .parquet file")
        self.file = file
        self.name = storable(file.stem)
        self.metric = metric
        self._by_task: dict[str, list[Row]] = {}
        seen: dict[tuple[str, str], Record] = {}
        records = read_records(file)
        check_metric(metric)
        if any(_value(record, "metric") == "anls" for record in records):
            check_metric("anls")
        for record in records:
            task = storable(str(_value(record, "task") or file.stem))
            if task == AVERAGE:
                raise ValueError(
                    f"{record.where} is of the task {AVERAGE!r}, as the mean over all tasks is called; give it another "
                    "name (without a column 'task', it is the file's)."
                )
            row_id = _value(record, "id")
            row_id = storable(str(record.number if row_id is None else row_id))
            problem = record.problem
            if (earlier := seen.setdefault((task, row_id), record)) is not record:
                problem = f"has the id {row_id!r} of {earlier.where}; make ids unique, or leave them out"
                row_id = f"{row_id} ({record.where})"
            self._by_task.setdefault(task, []).append(self._row(row_id, task, record, problem))
        self.tasks = tuple(self._by_task)

    def n_rows(self, task: str, limit: int | None) -> int:
        """Number of rows that :meth:`rows` yields."""
        return len(self._by_task[task][:limit])

    def rows(self, task: str, limit: int | None) -> Iterator[Row]:
        """Rows of a task in the file's order."""
        yield from self._by_task[task][:limit]

    def fingerprint(self) -> str:
        """Hash of the file; pictures beside it are not looked at, so that one can be mended without a new run."""
        return fingerprint([self.file])

    def _row(self, row_id: str, task: str, record: Record, problem: str | None) -> Row:
        def load() -> Sample:
            try:
                if problem is not None:
                    raise ValueError(problem)
                return self._sample(record)
            except (ValueError, OSError) as error:
                raise ValueError(f"{record.where} {error}") from error

        return Row(row_id, task, load)

    def _sample(self, record: Record) -> Sample:
        for name in ("id", "task"):
            _check_storable(name, str(_value(record, name)))
        question = _value(record, "question")
        check_question(question)
        _check_storable("question", question)
        answers = _answers(record)
        metric = str(_value(record, "metric") or self.metric)
        check_answers(metric, answers)
        return Sample(_images(record), question, answers, metric)


def _value(record: Record, name: str) -> Any:
    return record.values.get(name)


def _answers(record: Record) -> tuple[str, ...]:
    given = _value(record, "answers")
    if given is None or given == []:
        given = _value(record, "answer")
    listed = given if isinstance(given, list) else [given]
    if any(isinstance(answer, bool) for answer in listed):
        raise ValueError("has an answer that is true or false, not a text; write what the model is to say, such as yes")
    if not listed or not all(isinstance(answer, (str, int, float)) and str(answer).strip() for answer in listed):
        raise ValueError("has no answer; give a text in the column 'answer', or a list of them in 'answers'")
    for answer in listed:
        _check_storable("answers", str(answer))
    return tuple(str(answer) for answer in listed)


def _check_storable(column: str, text: str) -> None:
    if text != storable(text):
        raise ValueError(
            f"has half of a character (a lone surrogate) in the column {column!r}, {storable(text)[:80]}; write the "
            "whole character"
        )


def _images(record: Record) -> tuple[Image.Image, ...]:
    columns = record.images()
    found = columns.get("images")
    if not found:
        found = columns.get("image")
    listed = found if isinstance(found, list) else [found]
    if not listed or any(one is None for one in listed):
        raise ValueError(
            f"has no image; give a path or bytes in the column {IMAGE_COLUMNS[0]!r}, or a list of them in "
            f"{IMAGE_COLUMNS[1]!r}"
        )
    return tuple(row_image(one, record.folder) for one in listed)
