"""Accuracy of both small models on all kinds of tasks: a ``sparsevlm eval`` for each suite, side by side.

``python -m benchmark.accuracy_runs --gpus 4`` runs every selector at every budget on what either model was trained for,
and adds the rows to ``results/accuracy.csv``, each with the command of its own suite. A run that was stopped goes on
where it was. Weights of smol have to be written before (``sparsevlm smol-weights``).
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.timed import RESULTS
from sparsevlm.evaluation.settings import EvalConfig
from sparsevlm.evaluation.suites.registry import open_suite

# What a model was trained for: the bundled one reads its scenes only.
SUITES = {
    "bundled": ("demo", "grounds"),
    "smol": ("documents", "chat", "charts", "screens", "whole", "demo", "grounds"),
}


@dataclass(frozen=True)
class Asked:
    """What every suite is run with.

    Attributes
    ----------
    selectors, keep : str
        As ``sparsevlm eval`` takes them.
    n : int
        Questions of a suite at least, as many of each task.
    batch, workers : int
    """

    selectors: str = "all"
    keep: str = "0.5,0.37,0.25,adaptive"
    n: int = 200
    batch: int = 13
    workers: int = 8

    def command(self, model: str, suite: str, target: Path) -> list[str]:
        """Of one suite, without the place of the run's folder."""
        n_tasks = len(open_suite(EvalConfig(suite, model)).tasks)
        given = {
            **{"model": model, "suite": suite, "selectors": self.selectors, "keep": self.keep},
            **{
                "limit": -(-self.n // n_tasks),
                "batch": self.batch,
                "workers": self.workers,
                "append-to": os.path.relpath(target),
            },
        }
        return [
            "sparsevlm",
            "eval",
            "--yes",
            *(text for name, one in given.items() for text in (f"--{name}", str(one))),
        ]


def run_all(asked: Asked, models: Sequence[str], n_gpus: int, target: Path, logs: Path) -> int:
    """Run all suites of some models at once, each on one GPU, in turn; without one all share the CPU.

    Returns
    -------
    int
        How many failed; what each printed is in ``logs``.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started, wanted = [], [(model, suite) for model in models for suite in SUITES[model]]
    for i, (model, suite) in enumerate(wanted):
        command, log = asked.command(model, suite, target), logs / f"{suite}-{model}.log"
        place = os.environ | ({"CUDA_VISIBLE_DEVICES": str(i % n_gpus)} if n_gpus else {})
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=place)
        print(shlex.join(command), flush=True)
        started.append((process, log))
    n_failed = 0
    for process, log in started:
        if process.wait():
            n_failed += 1
            print(f"failed: {log}\n{log.read_text()[-2000:]}", flush=True)
    return n_failed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--gpus", type=int, default=0, help="how many there are; 0: on the CPU")
    parser.add_argument("--append-to", type=Path, default=RESULTS / "accuracy.csv")
    parser.add_argument("--logs", type=Path, default=Path("runs/logs"))
    for name, kind in (("selectors", str), ("keep", str), ("n", int), ("batch", int), ("workers", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Asked, name))
    given = vars(parser.parse_args())
    models, n_gpus, target, logs = (given.pop(name) for name in ("models", "gpus", "append_to", "logs"))
    if n_failed := run_all(Asked(**given), models, n_gpus, target, logs):
        sys.exit(f"{n_failed} suites failed")


if __name__ == "__main__":
    main()
