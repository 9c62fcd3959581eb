"""Runs the tasks of one setting in a process of its own: ``python -m benchmark.reproduce.child JOB``.

The model is loaded once. A task that fails is noted and the next one runs; with several processes a failure ends them
all, and the parent starts others for the rest.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmark.reproduce.scores import headline
from benchmark.reproduce.store import UNFINISHED, Fingerprint, Result, Store
from sparsevlm.evaluation.suites.lmms import task_manager

_PARENT_POLL_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """Tasks of one setting.

    Attributes
    ----------
    folder : str
        Of the results.
    setting : str
    arguments : dict
        Of the plugin's model.
    tasks : dict of str to dict
        Fingerprints by task.
    include_path : str or None
    limit : int or None
    parent : int
        Process whose end ends this one.
    """

    folder: str
    setting: str
    arguments: dict[str, Any]
    tasks: dict[str, Fingerprint]
    include_path: str | None
    limit: int | None
    parent: int

    def write(self, file: Path) -> None:
        """Stores the job for :func:`main`."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")


def main(file: Path) -> None:
    """Runs a job."""
    job = Job(**json.loads(file.read_text(encoding="utf-8")))
    threading.Thread(target=_end_with, args=(job.parent,), daemon=True).start()
    store = Store(Path(job.folder))
    manager = task_manager(job.include_path)
    model = _load(job.arguments)
    for task, fingerprint in job.tasks.items():
        if model.rank == 0:
            store.begin(job.setting, task)
        try:
            _run(job, task, fingerprint, model, manager, store)
        except Exception:
            # Of several processes the first to fail says why: the launcher ends the others.
            if store.failure(job.setting, task) == UNFINISHED:
                store.fail(job.setting, task, traceback.format_exc())
            traceback.print_exc()
            if model.world_size > 1:
                raise


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: nobody would wait for its results."""
    while True:
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)
        time.sleep(_PARENT_POLL_SECONDS)


def _load(arguments: dict[str, Any]) -> Any:
    from lmms_eval.models import get_model

    plugin = get_model("sparsevlm")

    class OfSeveralTasks(plugin):  # type: ignore[misc, valid-type]
        """Stays loaded when lmms-eval has done with a task."""

        def clean(self) -> None:
            self.last_totals = self.take_totals()

    return OfSeveralTasks(**arguments)


def _run(job: Job, task: str, fingerprint: Fingerprint, model: Any, manager: Any, store: Store) -> None:
    from lmms_eval.evaluator import simple_evaluate

    model.take_totals()  # of a task that failed
    begin = time.perf_counter()
    output = simple_evaluate(
        model=model,
        tasks=[task],
        batch_size=model.batch_size,
        limit=job.limit,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
        verbosity="WARNING",
        # Only where files for submission go, which some tasks write.
        cli_args=argparse.Namespace(output_path=job.folder, process_with_media=True),
    )
    if model.rank != 0:
        return
    samples, metrics = output["samples"][task], read_metrics(output, task)
    headline(metrics)  # raises where none is known as the task's score
    result = Result(
        fingerprint,
        metrics=metrics,
        n=len(samples),
        tokens=_tokens(model.last_totals.tasks.get(task)),
        seconds=time.perf_counter() - begin,
        origin={
            "batch_size": str(model.batch_size),
            "processes": str(model.world_size),
            "device": _device_name(model.device),
            "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
    )
    store.write(job.setting, task, result, [_sample(one, metrics) for one in samples])


def read_metrics(output: dict[str, Any], task: str) -> dict[str, float]:
    """Numbers of a task of which more is better, by metric.

    Raises
    ------
    ValueError
        If there are none.
    """
    better = output.get("higher_is_better", {}).get(task, {})
    metrics = {}
    for name, value in output["results"][task].items():
        metric, comma, _ = name.partition(",")
        is_number = isinstance(value, (int, float)) and not math.isnan(value)
        if comma and "_stderr" not in metric and is_number and better.get(metric, True):
            metrics[metric] = float(value)
    if not metrics:
        raise ValueError(f"task {task} has no number of which more is better: {output['results'][task]}.")
    return metrics


def _tokens(total: Any) -> dict[str, float]:
    if total is None:
        return {}
    return {"visual": total.n_visual, "inputs": total.average_in, "outputs": total.average_out}


def _sample(sample: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    responses = sample["filtered_resps"]
    answer = responses[0] if isinstance(responses, list) and len(responses) == 1 else responses
    return {
        "id": sample["doc_id"],
        "answer": str(answer),
        "target": str(sample["target"]),
        "scores": {name: json.loads(json.dumps(sample[name], default=str)) for name in metrics if name in sample},
    }


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
