"""Tasks of lmms-eval, scored by lmms-eval itself, as columns of the same table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...inputs import torchvision_works
from ...report import ReportTotal
from ..execution.resolved_model import ModelPlace
from ..reporting.lmms_results import read_lmms
from ..settings import DOWNSAMPLE, EvalConfig, Setting

MODEL = "sparsevlm"
MISSING = (
    "tasks of lmms-eval need lmms-eval: pip install 'lmms-eval==0.7.3', after torch, best in an environment of its own."
)
_NO_PIXELS = "lmms-eval loads the pictures itself, so that they cannot be made smaller here"


@dataclass(frozen=True)
class LmmsSuite:
    """Named tasks.

    Attributes
    ----------
    name : str
    tasks : tuple of str
    include_path : str or None
        Folder with task files of one's own.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    name = "lmms"

    def check(self) -> None:
        """Refuse what cannot run.

        Raises
        ------
        ModuleNotFoundError
            Without lmms-eval; the message has the pip line.
        ValueError
            If it knows no task of a name.
        """
        known = set(_task_manager(self.include_path).all_tasks)
        if unknown := [task for task in self.tasks if task not in known]:
            near = sorted(task for task in known if any(word.split("_")[0] in task for word in unknown))
            raise ValueError(
                f"lmms-eval has no task {', '.join(map(repr, unknown))}; near are {', '.join(near[:12]) or 'none'}. "
                "All of them: python -m lmms_eval --tasks list; a folder of your own: --include-path."
            )

    def fingerprint(self) -> str:
        """Version of lmms-eval, whose tasks carry versions of their own."""
        from importlib.metadata import version

        return f"lmms-eval {version('lmms-eval')}"


def run_lmms(
    config: EvalConfig,
    suite: LmmsSuite,
    place: ModelPlace,
    settings: Sequence[Setting],
    folder: Path,
    on_rows: Callable[[int], None],
) -> None:
    """Run what is missing, one setting at a time; a setting counts as done when its scores are written.

    Parameters
    ----------
    config : EvalConfig
    suite : LmmsSuite
    place : ModelPlace
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
            found, totals = _simple_evaluate(config, suite, place, setting)
            figures, predictions = read_lmms(found, totals, setting)
            lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in predictions)
            _write(folder / f"{setting.name}.jsonl", lines)
            _write(scores, json.dumps(figures, indent=1) + "\n")
        on_rows(len(suite.tasks))


def lmms_refusals(settings: Sequence[Setting]) -> dict[str, str]:
    """Settings that lmms-eval cannot run, by name, and why."""
    return {setting.name: _NO_PIXELS for setting in settings if setting.selector == DOWNSAMPLE}


def _simple_evaluate(
    config: EvalConfig, suite: LmmsSuite, place: ModelPlace, setting: Setting
) -> tuple[dict[str, Any], dict[str, ReportTotal]]:
    """What lmms-eval returned, and what the model counted by task."""
    manager = _task_manager(suite.include_path)
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import get_model

    model = get_model(MODEL)(**model_arguments(config, place, setting))
    found: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=list(suite.tasks),
        batch_size=config.batch,
        limit=config.limit,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=manager,
        verbosity="WARNING",
    )
    return found, dict(model.totals.tasks)


def model_arguments(config: EvalConfig, place: ModelPlace, setting: Setting) -> dict[str, Any]:
    """What ``--model_args`` of ``python -m lmms_eval --model sparsevlm`` would say."""
    arguments: dict[str, Any] = {
        "pretrained": str(place.folder),
        "device": place.device,
        "dtype": place.dtype,
        "attn_implementation": config.attn,
        "batch_size": config.batch,
    }
    if setting.pruning is None:
        return {**arguments, "keep": 1.0}
    pruning = {"selector": setting.selector, "keep": setting.keep, **config.options}
    if setting.pruning.target_layers is not None:
        pruning["target_layers"] = list(setting.pruning.target_layers)
    if setting.seed is not None:
        pruning["seed"] = setting.seed
    return {**arguments, **pruning}


def _task_manager(include_path: str | None) -> Any:
    torchvision_works()
    try:
        from lmms_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lmms_eval":
            raise
        raise ModuleNotFoundError(MISSING) from error
    return TaskManager(verbosity="WARNING", include_path=include_path)


def _write(file: Path, text: str) -> None:
    """In one step, so that a kill leaves no half of a file."""
    aside = file.with_name(file.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)
