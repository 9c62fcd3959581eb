"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..bundled import BUNDLED

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before what takes more than ten minutes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what goes on.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, or one of several, such as cuda:1.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="auto (as stored), float32, float16 or bfloat16.",
        show_default="auto; of the bundled model on a CPU float32",
    ),
]
Selector = Annotated[
    str | None,
    typer.Option(
        "--selector", help="Built-in method, such as span, sparsevlm or random.", show_default="span-features"
    ),
]
KEEP_HELP = (
    "Visual tokens averaged over the decoder layers: a fraction with a point (0.25), a number of tokens (64), or "
    "'adaptive', where the selector decides, or at target layers the rank of the attention."
)


def dtype_of(model: str, device: str, dtype: str | None = None) -> str:
    """Dtype that a model is loaded in: what was asked for, else as stored, which is slow for bfloat16 on most CPUs."""
    if dtype is not None:
        return dtype
    return "float32" if model == BUNDLED and device == "cpu" else "auto"


def parse_keep(text: str | None) -> int | float | None:
    """Return the budget that ``--keep`` names; ``None`` is adaptive.

    Raises
    ------
    ValueError
        If it is neither a number nor ``adaptive``.
    """
    if text is None or text == "adaptive":
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise ValueError(
            f"--keep must be a fraction such as 0.25, a number of tokens such as 64, or 'adaptive', got {text!r}."
        ) from error


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Return the layers of ``--target-layers 2,6,10``; ``None`` is the default.

    Raises
    ------
    ValueError
        If something between the commas is no whole number.
    """
    if text is None:
        return None
    try:
        return tuple(int(piece) for piece in text.split(","))
    except ValueError as error:
        raise ValueError(f"--target-layers must be layer numbers with commas, such as 2,6,10, got {text!r}.") from error


def prepare_folder(folder: Path) -> Path:
    """Make the folder that files will go to.

    Raises
    ------
    ValueError
        If there is a file in the way, or none can be made there.
    PermissionError
        If nothing may be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"cannot write to folder {folder}: a file is in its place.") from error
    except PermissionError as error:
        raise PermissionError(f"cannot make folder {folder}: permission denied; name another.") from error
    except OSError as error:
        raise ValueError(f"cannot make folder {folder}: {error.strerror}; name another.") from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to folder {folder}: permission denied; name another.")
    return folder


def prepare_file(path: Path | None, suffix: str) -> Path | None:
    """Check the name of a file to be written and make its folder.

    Raises
    ------
    ValueError
        If the name does not end in ``suffix``, or is a folder's.
    PermissionError
        If it may not be written.
    """
    if path is None:
        return None
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file.")
    prepare_folder(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {path}: permission denied; name another file.")
    return path
