"""Commands as they stand in stored rows."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence


def command_of(script: str, arguments: Sequence[str]) -> str:
    """The command that gives the same rows again, wherever these were appended to.

    Parameters
    ----------
    script : str
        Module in ``benchmark``.
    arguments : sequence of str
    """
    place = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    place.add_argument("--append-to")
    return shlex.join(["python", "-m", f"benchmark.{script}", *place.parse_known_args(arguments)[1]])
