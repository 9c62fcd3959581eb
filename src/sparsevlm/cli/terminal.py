"""Progress, warnings and errors of the commands, all on stderr."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from ..error_notes import with_notes

# What users cause: files, options, unsupported models, missing packages. Anything else is a fault of ours and ends with
# code 1.
_LONG = 600.0  # seconds from which on a command asks
_USER_ERRORS = (ValueError, TypeError, IndexError, NotImplementedError, OSError, ImportError)


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions of a command into one line on stderr and exit code 2, or a traceback with ``--debug``."""

    @functools.wraps(command)
    def guarded(*args: Any, debug: bool = False, **options: Any) -> None:
        logging.basicConfig(level=logging.INFO if debug else logging.WARNING, format="%(levelname)s: %(message)s")
        try:
            command(*args, debug=debug, **options)
        except (typer.Abort, typer.Exit, BrokenPipeError):  # the last: of a reader that has gone, such as head
            raise
        except _USER_ERRORS as error:
            if debug:
                raise
            _print_line("error: ", "red", _one_line(error))
            raise typer.Exit(2) from error
        except Exception as error:
            if debug:
                raise
            _print_line("internal error: ", "red", f"{type(error).__name__}: {_one_line(error)} (--debug shows where)")
            raise typer.Exit(1) from error

    return guarded


def show_warning(message: Warning | str, *_place: Any) -> None:
    """Print a Python warning as one line; takes the place of ``warnings.showwarning``."""
    _print_line("warning: ", "yellow", _one_line(message))


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show that something is under way; the value advances a bar of ``total`` steps.

    A terminal gets a moving bar that vanishes at the end, a file one plain line.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(Text(label))
        yield _nothing
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(label, total=total)
        yield lambda: bars.advance(task)


class StepLine:
    """Line on stderr that says what is under way and for how long, until it is cleared or replaced.

    It is drawn when it is told to and at no other time: a thread that keeps it moving would run beside what is timed.
    A file gets the steps that are marked, a plain line each.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._line: Progress | None = None

    def __enter__(self) -> StepLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, text: str, *, in_files: bool) -> None:
        """Show a step.

        Parameters
        ----------
        text : str
        in_files : bool
            Whether stderr gets it where it is no terminal.
        """
        if not self._console.is_terminal:
            if in_files:
                self._console.print(Text(text), soft_wrap=True)
            return
        if self._line is None:
            columns = [TimeElapsedColumn(), TextColumn("{task.description}", markup=False)]
            self._line = Progress(*columns, console=self._console, transient=True, auto_refresh=False)
            self._line.add_task(text, total=None)
            self._line.start()
        self._line.update(self._line.task_ids[0], description=text, refresh=True)

    def clear(self) -> None:
        """Take the line away; the next begins at no time."""
        if self._line is not None:
            self._line.stop()
            self._line = None


def confirm_long(seconds: float, words: str, shorter: str, *, yes: bool) -> None:
    """Ask before what takes more than ten minutes; where nobody can answer it is refused.

    Parameters
    ----------
    seconds : float
        Estimated.
    words : str
        The same for the reader.
    shorter : str
        What takes less time.
    yes : bool
        Whether the answer is known.

    Raises
    ------
    ValueError
    """
    if yes or seconds <= _LONG:
        return
    if not _is_answered():
        raise ValueError(f"this takes {words}: add --yes to start it, or choose {shorter}.")
    typer.confirm(f"This takes {words}. Start?", abort=True, err=True)


def _is_answered() -> bool:
    """Tells whether there is somebody to answer."""
    return sys.stdin.isatty()


def quiet_transformers() -> None:
    """Keep transformers' own bars and advice out of the output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _nothing() -> None:
    """Advance no bar."""


def _one_line(error: object) -> str:
    said = with_notes(error) if isinstance(error, BaseException) else str(error)
    return " ".join(said.split()) or type(error).__name__


def _print_line(prefix: str, colour: str, text: str) -> None:
    # soft_wrap: one line stays one line, so that it can be searched for and copied.
    Console(stderr=True).print(Text(prefix, style=f"bold {colour}") + Text(text), soft_wrap=True)
