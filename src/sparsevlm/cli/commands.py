"""The commands in one application. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from .. import __version__
from ..collision import check_collision
from .bench import bench
from .demo import demo
from .evaluate import evaluate
from .explore import explore
from .run import run
from .serve import serve
from .smol import smol_weights
from .terminal import show_warning
from .visualize import visualize

app = typer.Typer(
    name="sparsevlm",
    help="Training-free visual token pruning for Hugging Face vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(demo)
app.command()(run)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(visualize)
app.command()(serve)
app.command()(explore)
app.command()(smol_weights)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsevlm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Training-free visual token pruning for Hugging Face vision-language models."""


def run_command_line() -> None:
    """Run the command that the process was started with."""
    warnings.showwarning = show_warning  # type: ignore[assignment]
    check_collision()
    app(prog_name="sparsevlm")
