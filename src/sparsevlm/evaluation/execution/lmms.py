"""Runs tasks of lmms-eval under every setting and stores its scores and predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...report_total import ReportTotal
from ..settings import DOWNSAMPLE, EvalConfig, Setting
from ..suites.lmms import LmmsSuite, task_manager
from .predictions import Prediction
from .resolved_model import ResolvedModel
from .run_folder import write_whole

MODEL = "sparsevlm"


def run_lmms(
    config: EvalConfig,
    suite: LmmsSuite,
    model: ResolvedModel,
    settings: Sequence[Setting],
    folder: Path,
    on_rows: Callable[[int], None],
) -> None:
    """Runs the settings that are missing; a setting is done when its scores are written.

    Parameters
    ----------
    config : EvalConfig
    suite : LmmsSuite
    model : ResolvedModel
    settings : sequence of Setting
    folder : Path
        Of the predictions.
    on_rows : callable
        Called with the number of tasks that have been dealt with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        scores = folder / f"{setting.name}.scores.json"
        if not scores.is_file():
            output, totals = _simple_evaluate(config, suite, model, setting)
            figures, predictions = read_lmms(output, totals, setting)
            lines = "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
            write_whole(folder / f"{setting.name}.jsonl", lines)
            write_whole(scores, json.dumps(figures, indent=1) + "\n")
        on_rows(len(suite.tasks))


def _simple_evaluate(
    config: EvalConfig, suite: LmmsSuite, model: ResolvedModel, setting: Setting
) -> tuple[dict[str, Any], dict[str, ReportTotal]]:
    """Returns the output of lmms-eval, and the model's totals by task."""
    manager = task_manager(suite.include_path)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model

    pruned = get_model(MODEL)(**model_arguments(config, model, setting))
    output: dict[str, Any] = simple_evaluate(
        model=pruned,
        tasks=list(suite.tasks),
        batch_size=config.batch,
        limit=config.limit,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
        verbosity="WARNING",
    )
    return output, dict(pruned.totals.tasks)


def model_arguments(config: EvalConfig, model: ResolvedModel, setting: Setting) -> dict[str, Any]:
    """Makes the ``--model_args`` of ``python -m lmms_eval --model sparsevlm``."""
    arguments: dict[str, Any] = {
        "pretrained": str(model.folder),
        "device": model.device,
        "dtype": model.dtype,
        "attn_implementation": config.attn,
        "batch_size": config.batch,
    }
    if setting.selector == DOWNSAMPLE:
        return {**arguments, "selector": DOWNSAMPLE, "keep": setting.keep}
    if setting.pruning is None:
        return {**arguments, "keep": 1.0}
    pruning = {"selector": setting.selector, "keep": setting.keep, **config.options}
    if setting.pruning.target_layers is not None:
        pruning["target_layers"] = list(setting.pruning.target_layers)
    if setting.seed is not None:
        pruning["seed"] = setting.seed
    return {**arguments, **pruning}


def read_lmms(
    output: dict[str, Any], totals: Mapping[str, ReportTotal], setting: Setting
) -> tuple[dict[str, dict[str, Any]], list[Prediction]]:
    """Reads the output of lmms-eval: scores by task and metric, and a prediction per logged sample and metric.

    A task with several metrics becomes several rows of the table, ``task:metric``. Metrics of which less is better,
    and what is no number, are left out.

    Parameters
    ----------
    output : dict
        Of ``simple_evaluate``.
    totals : mapping
        Totals of the model by task.
    setting : Setting

    Returns
    -------
    figures : dict
        Per row of the table: ``score`` as lmms-eval aggregates it, ``n`` samples, and means of the totals.
    predictions : list of dict
        With a ``score`` if the sample has a single number.
    """
    figures: dict[str, dict[str, Any]] = {}
    predictions: list[Prediction] = []
    for task, samples in output["samples"].items():
        better = output.get("higher_is_better", {}).get(task, {})
        metrics = [(name, value) for name, value in _metrics(output["results"][task]) if better.get(name, True)]
        for metric, value in metrics:
            row = task if len(metrics) == 1 else f"{task}:{metric}"
            figures[row] = {"score": value, "n": len(samples), **_counted(totals.get(task))}
            predictions += [_prediction(row, metric, sample, setting) for sample in samples]
    return figures, predictions


def _counted(total: ReportTotal | None) -> dict[str, float]:
    """Means per sample; an unpruned run counts no FLOPs."""
    if total is None or not total.n_samples:
        return {}
    counted = {"n_visual": total.n_visual, "avg_tokens": total.average_in}
    if total.flops.dense:
        counted["tflops"] = total.flops.sparse / total.n_samples / 1e12
        counted["dense_tflops"] = total.flops.dense / total.n_samples / 1e12
    return counted


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in results.items():
        metric, comma, _ = name.partition(",")
        if comma and "_stderr" not in metric and isinstance(value, (int, float)) and not math.isnan(value):
            yield metric, float(value)


def _prediction(row: str, metric: str, sample: dict[str, Any], setting: Setting) -> Prediction:
    responses = sample["filtered_resps"]
    prediction = {
        "id": str(sample["doc_id"]),
        "task": row,
        "setting": setting.name,
        "prediction": str(responses[0] if isinstance(responses, list) and len(responses) == 1 else responses),
        "answers": [str(sample["target"])],
    }
    score = sample.get(metric)
    if isinstance(score, dict):
        score = score.get("score")
    return {**prediction, "score": float(score)} if isinstance(score, (int, float)) else prediction
