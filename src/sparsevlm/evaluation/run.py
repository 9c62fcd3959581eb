"""One evaluation from its configuration to its table."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .execution.feasible import feasible_settings
from .execution.lmms import run_lmms
from .execution.predictions import PredictionStore
from .execution.provenance import versions
from .execution.resolved_model import resolve_model
from .execution.run_folder import RunFolder
from .execution.sharding import Shard, run_shard
from .execution.workers import run_workers
from .reporting.csv_rows import append_rows, check_target, csv_rows, write_rows
from .reporting.lmms_results import lmms_results
from .reporting.plot import plot
from .reporting.results import Result, failures, left_out, make_results, not_averaged
from .reporting.table import markdown
from .settings import EvalConfig, make_settings
from .suites.lmms import LmmsSuite
from .suites.registry import lmms_suite, open_suite
from .suites.suite import chosen_tasks

NOTES = (
    "tokens: visual tokens of a sample, averaged over the inputs of the decoder layers, recycled ones included, of "
    "those in the prompt.",
    "retained: 100 · score / dense score over the rows that both answered, the mean of the tasks; 95 % interval of a "
    "paired bootstrap over rows (percentiles of 2000 draws, within each task). Where not one row was lost the interval "
    "has no width: with n rows a loss of up to about 3/n can hide there.",
    "TFLOPs: the decoder's prefill, estimated; vision tower, head and decoding excluded.",
    "ms: wall time of generate per row, measured per batch and divided by its rows; the median.",
)
_SHARED_DEVICE = "{workers} workers shared the device: ms says nothing about one of them alone."


@dataclass(frozen=True)
class Evaluation:
    """Outcome of a run.

    Attributes
    ----------
    folder : Path
        With ``config.json``, ``predictions/``, ``metrics.csv``, ``table.md``, ``plot.png`` and ``plot.svg``.
    results : list of Result
    failed : dict
        (task, id) of rows without a score in some setting, and why.
    unsupported : dict
        Settings that the model cannot run, by name, and why.
    """

    folder: Path
    results: list[Result]
    failed: dict[tuple[str, str], str]
    unsupported: dict[str, str]


class EvaluationRun:
    """An evaluation that is ready to run: what was asked for exists and fits.

    Parameters
    ----------
    config : EvalConfig
    out : Path
        Where run folders are.

    Attributes
    ----------
    folder : Path
    n_total : int
        Rows (for lmms-eval: tasks) times settings that the model can run, done ones included.

    Raises
    ------
    FileNotFoundError, ValueError, TypeError
        For suites, tasks, models, selectors and options that do not exist or do not fit, and for budgets that the
        model cannot hold.
    """

    def __init__(self, config: EvalConfig, out: Path) -> None:
        self.config = config
        make_settings(config)  # first, as it takes no time and finds what is misspelt
        self._suite = lmms_suite(config) or open_suite(config)
        self._place = resolve_model(config)
        self._settings, self._refused = feasible_settings(config, self._place.folder)
        self._run_folder = RunFolder(out, config, f"{self._suite.name}-{self._place.name}")
        self.folder = self._run_folder.path
        if isinstance(self._suite, LmmsSuite):
            n_rows = len(self._suite.tasks)
        else:
            tasks = chosen_tasks(self._suite, config.tasks)
            n_rows = sum(self._suite.n_rows(task, config.limit) for task in tasks)
        self.n_total = len(self._settings) * n_rows

    def execute(
        self,
        *,
        workers: int = 1,
        resume: bool = True,
        collect: Path | None = None,
        command: Sequence[str] = (),
        on_rows: Callable[[int], None] = lambda n_rows: None,
        confirm: Callable[[float], None] = lambda seconds: None,
    ) -> Evaluation:
        """Run what is missing and write the tables.

        Parameters
        ----------
        workers : int
            Processes that share the device.
        resume : bool
            Whether to go on with the predictions that the folder holds.
        collect : Path, optional
            A CSV file that the rows are added to.
        command : sequence of str
            What the user typed, for the stored rows.
        on_rows : callable
            Called with the number of rows, of :attr:`n_total`, that have been dealt with.
        confirm : callable
            Called with the seconds that the rest will take, once the first batch is answered by one process; raises
            where that is too long.

        Raises
        ------
        ValueError
            If the folder or the CSV file is of another kind, or cannot be written.
        """
        if collect is not None:
            check_target(collect)
        found_versions = versions(self._place, self._suite.fingerprint())
        folder, config = self._run_folder, self.config
        with folder.locked():
            folder.open(config, found_versions, resume=resume)
            measure = self._measure_lmms if isinstance(self._suite, LmmsSuite) else self._measure
            evaluation = measure(workers, _Rest(self.n_total, on_rows, confirm))
            origin = {
                **_origin(config, found_versions),
                "model": self._place.name,
                "suite": self._suite.name,
                "workers": workers,
                "command": shlex.join(command),
                "run": self.folder.name,
            }
            _write(evaluation, origin, collect)
        return evaluation

    def _measure(self, workers: int, rest: _Rest) -> Evaluation:
        assert not isinstance(self._suite, LmmsSuite)
        folder = self._run_folder.predictions
        if workers > 1:
            run_workers(self.config, folder, workers, self._settings, rest.count)
        else:
            run_shard(self.config, self._suite, folder, Shard(), self._settings, rest.count, rest.estimate)
        stored = PredictionStore(folder).read()
        results = make_results(self._settings, chosen_tasks(self._suite, self.config.tasks), stored)
        return Evaluation(self.folder, results, failures(stored), self._refused)

    def _measure_lmms(self, workers: int, rest: _Rest) -> Evaluation:
        assert isinstance(self._suite, LmmsSuite)
        if workers > 1:
            raise ValueError("--workers is not for tasks of lmms-eval; it has its own way: see docs/reproduce.md.")
        folder = self._run_folder.predictions
        run_lmms(self.config, self._suite, self._place, self._settings, folder, rest.count)
        return Evaluation(self.folder, lmms_results(self._settings, folder), {}, self._refused)


class _Rest:
    """Answers that are left of a run, and how long they take."""

    def __init__(self, n_left: int, on_rows: Callable[[int], None], confirm: Callable[[float], None]) -> None:
        self._n_left, self._on_rows, self._confirm = n_left, on_rows, confirm

    def count(self, n_rows: int) -> None:
        """Take off what has been dealt with."""
        self._n_left -= n_rows
        self._on_rows(n_rows)

    def estimate(self, seconds: float) -> None:
        """Ask about the rest, by the seconds that one answer takes."""
        self._confirm(seconds * self._n_left)


def _origin(config: EvalConfig, found_versions: dict[str, str]) -> dict[str, Any]:
    """Columns that all rows of a run share."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        **{name: value for name, value in found_versions.items() if name != "sparsevlm"},
        "target_layers": " ".join(map(str, config.target_layers or ())) or "default",
        "options": " ".join(f"{name}={value}" for name, value in sorted(config.options.items())),
        "batch": config.batch,
        "timestamp": now.isoformat(timespec="seconds"),
    }


def _write(evaluation: Evaluation, origin: dict[str, Any], collect: Path | None) -> None:
    folder, workers = evaluation.folder, origin["workers"]
    rows = csv_rows(evaluation.results, origin)
    write_rows(folder / "metrics.csv", rows)
    title = f"{origin['suite']} on {origin['model']}"
    notes = [*NOTES, *([_SHARED_DEVICE.format(workers=workers)] if workers > 1 else [])]
    notes += [*left_out(evaluation.unsupported), *not_averaged(evaluation.results)]
    notes.append(", ".join(f"{name} {origin[name]}" for name in ("device", "dtype", "torch", "transformers", "commit")))
    (folder / "table.md").write_text(markdown(title, evaluation.results, evaluation.failed, notes), encoding="utf-8")
    plot(evaluation.results, title, [folder / "plot.png", folder / "plot.svg"])
    if collect is not None:  # last: a file that cannot be written by now costs nothing of the run's own
        append_rows(collect, rows)
