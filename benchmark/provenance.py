"""What every stored row carries besides its figure."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, str]:
    """Device, versions, commit, time and command of this process."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", f"benchmark.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def _commit() -> str:
    """Commit of the checkout, with a mark where files differ from it; SPARSEVLM_COMMIT where git is not there."""
    if given := os.environ.get("SPARSEVLM_COMMIT"):
        return given
    root = Path(__file__).parent.parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    dirty = git("status", "--porcelain", "--", "src", "benchmark/*.py")
    return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if dirty else "")


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
