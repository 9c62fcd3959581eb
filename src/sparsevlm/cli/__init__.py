"""The command line: parsing and printing only. Its packages are those of the extra ``cli``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

_NEEDS = ("typer", "rich", "matplotlib")


def main() -> None:
    """Entry point of the ``sparsevlm`` command and of ``python -m sparsevlm``."""
    if missing := [name for name in _NEEDS if find_spec(name) is None]:
        sys.stderr.write(
            f"error: the command line needs {', '.join(missing)}, which the extra cli brings: run `pip install "
            '".[cli]"` in the source tree, or `pip install "WHEEL[cli]"` with the path of a wheel built from it.\n'
        )
        sys.exit(2)
    from .commands import run_command_line

    run_command_line()


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .commands import app

    return app


__all__ = ["app", "main"]
