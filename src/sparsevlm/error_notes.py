"""Notes on errors, such as the selector that an error comes from."""

from __future__ import annotations

import sys


def add_note(error: BaseException, note: str) -> None:
    """Add a note, once, that a traceback shows behind the error's message; its type and message stay.

    Before Python 3.11, whose tracebacks show no notes, it is shown as the cause of the error, where that has none.

    Parameters
    ----------
    error : BaseException
    note : str
    """
    if note in getattr(error, "__notes__", ()):  # one object, raised again
        return
    if sys.version_info >= (3, 11):
        error.add_note(note)
        return
    error.__notes__ = [*getattr(error, "__notes__", ()), note]
    if error.__cause__ is None:
        error.__cause__ = RuntimeError(note)


def with_notes(error: BaseException) -> str:
    """Message of an error, its notes in brackets behind it.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    str
    """
    notes = "; ".join(map(str, getattr(error, "__notes__", ())))
    return " ".join(filter(None, (str(error), notes and f"({notes})")))
