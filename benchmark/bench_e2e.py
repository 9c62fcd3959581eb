"""Whole ``generate`` calls: ``sparsevlm bench`` with rows in ``results/e2e.csv``.

``python -m benchmark.bench_e2e`` takes the options of ``sparsevlm bench``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from benchmark.e2e_rows import E2E
from sparsevlm.cli import main as sparsevlm


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``sparsevlm bench``; the rows hold the command as it would have to be typed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument.startswith("--append-to") for argument in given):
        given += ["--append-to", os.path.relpath(E2E)]  # the rows hold it
    sys.argv = ["sparsevlm", "bench", *given]
    sparsevlm()


if __name__ == "__main__":
    main()
