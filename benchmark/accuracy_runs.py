"""Accuracy of both small models on all kinds of tasks: a ``sparsevlm eval`` for each suite, several side by side.

``python -m benchmark.accuracy_runs --gpus 4`` runs every selector at every budget on what either model answers about,
and adds the rows to ``results/accuracy.csv``, each with the command of its own suite; with ``--ablation`` it runs what
parts of a method do instead. A run that was stopped goes on where it was. Weights of smol have to be written before
(``sparsevlm smol-weights``). Many processes share a GPU, for which there is NVIDIA's MPS.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark.timed import RESULTS
from sparsevlm.evaluation.settings import EvalConfig
from sparsevlm.evaluation.suites.registry import open_suite

# What a model answers about: the bundled one its scenes alone, of which it was trained on the plain ones.
SUITES = {
    "bundled": ("demo", "grounds"),
    "smol": ("documents", "chat", "charts", "screens", "whole", "demo", "grounds"),
}

N_LAYERS = {"bundled": 24, "smol": 30}
_OF = 32  # layers of LLaVA-1.5-7B, of which published target layers are


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
    options : tuple of str
        Further options of ``sparsevlm eval``.
    layers : tuple of int
        Target layers in a decoder of 32; of each model those at the same share of its depth. Empty: the default ones.
    """

    selectors: str = "all"
    keep: str = "0.5,0.37,0.25,adaptive"
    n: int = 200
    batch: int = 50
    workers: int = 3
    options: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    def command(self, model: str, suite: str, target: Path) -> list[str]:
        """Of one suite, without the place of the run's folder."""
        n_tasks = len(open_suite(EvalConfig(suite, model)).tasks)
        given = {
            **{"model": model, "suite": suite, "selectors": self.selectors, "keep": self.keep},
            **{"limit": -(-self.n // n_tasks), "batch": self.batch, "workers": self.workers},
            "append-to": os.path.relpath(target),
        }
        layers = ",".join(str(round(layer * N_LAYERS[model] / _OF)) for layer in self.layers)
        return [
            "sparsevlm",
            "eval",
            "--yes",
            *(text for name, one in given.items() for text in (f"--{name}", str(one))),
            *self.options,
            *(("--target-layers", layers) if layers else ()),
        ]


def ablation(asked: Asked) -> list[Asked]:
    """Lists what the ablation asks of every suite; of ``asked`` it takes the numbers.

    Options of the methods, few tokens, and target layers: one where these models look for what is asked, and those of
    the publications, of PyramidDrop those that its authors name for small budgets.
    """
    by_options = (
        ("span,span-joint,sparsevlm,pyramiddrop,random,grid", "0.25", "schedule=single"),
        ("span,fastv,priortr", "0.25", "schedule=geometric"),
        ("span-joint,sparsevlm", "0.25", "recycle=false"),
        ("sparsevlm", "0.25", "raters=all"),
        ("span,sparsevlm", "adaptive", "rank_lambda=0.25"),
        ("span-features,span,span-joint,mmtok,scope,divprune,sparsevlm,random", "0.15", "min_keep=8"),
    )
    by_layers = (
        ("span,sparsevlm,fastv,priortr,random", "0.75", (21,)),
        ("fastv", "0.37,0.25", (1,)),
        ("sparsevlm", "0.37,0.25", (2, 6, 15)),
        ("pyramiddrop", "0.37,0.25", (1, 7, 15)),
        ("v2drop", "0.37,0.25", (2, 16, 21)),
    )
    asked = replace(asked, workers=1)
    found = [replace(asked, selectors=names, keep=keep, options=("--set", one)) for names, keep, one in by_options]
    return found + [replace(asked, selectors=names, keep=keep, layers=layers) for names, keep, layers in by_layers]


def run_all(asked: Sequence[Asked], models: Sequence[str], n_gpus: int, target: Path, logs: Path, at_once: int) -> int:
    """Run all suites of some models, so many at once, on the GPUs in turn; without one all share the CPU.

    Returns
    -------
    int
        How many failed; what each printed is in ``logs``.
    """
    logs.mkdir(parents=True, exist_ok=True)
    wanted = [(one, model, suite) for one in asked for model in models for suite in SUITES[model]]

    def run(number: int) -> int:
        one, model, suite = wanted[number]
        command, log = one.command(model, suite, target), logs / f"{number:02}-{suite}-{model}.log"
        place = os.environ | ({"CUDA_VISIBLE_DEVICES": str(number % n_gpus)} if n_gpus else {})
        print(shlex.join(command), flush=True)
        with log.open("w") as file:
            failed = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=place, check=False).returncode
        if failed:
            print(f"failed: {log}\n{log.read_text()[-2000:]}", flush=True)
        return int(bool(failed))

    with ThreadPoolExecutor(at_once) as pool:
        return sum(pool.map(run, range(len(wanted))))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--gpus", type=int, default=0, help="how many there are; 0: on the CPU")
    parser.add_argument("--append-to", type=Path, default=RESULTS / "accuracy.csv")
    parser.add_argument("--logs", type=Path, default=Path("runs/logs"))
    parser.add_argument("--at-once", type=int, default=9, help="suites that run side by side")
    parser.add_argument("--ablation", action="store_true", help="parts of methods instead of all selectors")
    for name, kind in (("selectors", str), ("keep", str), ("n", int), ("batch", int), ("workers", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Asked, name))
    given = vars(parser.parse_args())
    names = ("models", "gpus", "append_to", "logs", "at_once", "ablation")
    models, n_gpus, target, logs, at_once, is_ablation = (given.pop(name) for name in names)
    asked = Asked(**given)
    if shutil.which("sparsevlm") is None:
        sys.exit("the command sparsevlm is not on PATH: activate the environment that it is installed in.")
    if n_failed := run_all(ablation(asked) if is_ablation else [asked], models, n_gpus, target, logs, at_once):
        sys.exit(f"{n_failed} runs failed")


if __name__ == "__main__":
    main()
