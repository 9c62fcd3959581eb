"""Shards of a run: the batches of one worker, answered and stored as far as they are missing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..metrics.scores import score
from ..settings import EvalConfig, Setting
from ..suites.suite import Row, Sample, Suite, chosen_tasks, storable
from .generation import Answer, BatchGenerator, generate_each
from .predictions import Prediction, PredictionStore, Stored

_WARMUP_SAMPLES = 2  # samples
# Decimal places of what is stored.
_ROUNDING = {"avg_tokens": 3, "tflops": 6, "ms": 3}


@dataclass(frozen=True)
class Shard:
    """Every ``count``-th batch from the ``index``-th on: the batches of one worker."""

    index: int = 0
    count: int = 1


def batches(suite: Suite, config: EvalConfig, shard: Shard) -> Iterator[tuple[int, list[Row]]]:
    """Yields the numbered batches of a shard, of one task each.

    Neither the workers nor stored predictions change which rows share a batch: selectors that draw at random depend on
    the number of the batch and the place in it, and so do last digits.
    """
    number = 0
    for task in chosen_tasks(suite, config.tasks):
        rows = list(suite.rows(task, config.limit))
        for first in range(0, len(rows), config.batch):
            if number % shard.count == shard.index:
                yield number, rows[first : first + config.batch]
            number += 1


def run_shard(
    config: EvalConfig,
    suite: Suite,
    folder: Path,
    shard: Shard,
    settings: Sequence[Setting],
    on_rows: Callable[[int], None],
    on_pace: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Answers the missing rows of a shard and stores the predictions, batch by batch.

    Parameters
    ----------
    config : EvalConfig
    suite : Suite
    folder : Path
        Of the predictions.
    shard : Shard
    settings : sequence of Setting
    on_rows : callable
        Called with the number of rows of one setting that have been dealt with.
    on_pace : callable
        Called once, when the first batch is answered, with the seconds that one answer took.
    """
    store = PredictionStore(folder, shard.index)
    stored = store.read()
    generator = BatchGenerator(config, config.max_new_tokens or suite.max_new_tokens)
    is_warm = has_pace = False
    for number, batch in batches(suite, config, shard):
        missing = {setting.name: _missing(batch, stored.get(setting.name, {})) for setting in settings}
        on_rows(sum(len(batch) - len(rows) for rows in missing.values()))
        if not any(missing.values()):
            continue
        loaded, unusable = _load(batch)
        pending = [setting for setting in settings if missing[setting.name]]
        samples = list(loaded.values())
        if samples and not is_warm:
            _warmup(generator, pending, samples)
            is_warm = True
        for setting in pending:
            wanted = missing[setting.name]
            outcomes: dict[str, Any] = dict(unusable)
            # The whole batch again where a kill left a part of it, for the reason given at batches.
            begin = time.perf_counter()
            if wanted & set(loaded):
                outcomes.update(
                    zip(
                        loaded,
                        generate_each(partial(generator.generate, setting.for_batch(number)), samples),
                        strict=True,
                    )
                )
            predictions = [
                _prediction(row, setting, loaded.get(row.id), outcomes[row.id]) for row in batch if row.id in wanted
            ]
            store.append(setting.name, [prediction for prediction in predictions if not _is_known(prediction, stored)])
            on_rows(len(wanted))
            if samples and not has_pace:
                has_pace = True
                on_pace((time.perf_counter() - begin) / len(samples))


def _missing(batch: Sequence[Row], done: dict[tuple[str, str], Prediction]) -> set[str]:
    """Ids of rows without a score; failed rows are tried again, as their file may have been mended."""
    return {row.id for row in batch if "score" not in done.get((row.task, row.id), {})}


def _is_known(prediction: Prediction, stored: Stored) -> bool:
    before = stored.get(prediction["setting"], {}).get((prediction["task"], prediction["id"]))
    return before is not None and before == prediction


def _load(batch: Sequence[Row]) -> tuple[dict[str, Sample], dict[str, Exception]]:
    """Loads samples by id; for unusable rows returns the error."""
    loaded: dict[str, Sample] = {}
    unusable: dict[str, Exception] = {}
    for row in batch:
        try:
            loaded[row.id] = row.load()
        except (ValueError, OSError) as error:
            unusable[row.id] = error
    return loaded, unusable


def _warmup(generator: BatchGenerator, settings: Sequence[Setting], samples: list[Sample]) -> None:
    """Answers two samples without and with pruning, so that no stored time holds the costs of a first call."""
    for is_pruned in (False, True):
        matching = [setting for setting in settings if (setting.pruning is not None) is is_pruned]
        if matching:
            with contextlib.suppress(ValueError, RuntimeError):  # a sample at fault is told when its turn comes
                generator.generate(matching[0], samples[:_WARMUP_SAMPLES])


def _prediction(row: Row, setting: Setting, sample: Sample | None, outcome: Answer | Exception) -> Prediction:
    head = {"id": row.id, "task": row.task, "setting": setting.name}
    if isinstance(outcome, Exception):
        message = " ".join(str(outcome).split()) or type(outcome).__name__
        return {**head, "error": storable(message)}  # it may quote the path of an image
    assert sample is not None  # only loaded samples have answers
    figures = asdict(outcome)
    figures.update((name, round(figures[name], places)) for name, places in _ROUNDING.items())
    prediction = figures.pop("text")
    scores = score(sample.metric, prediction, sample.answers)
    return {**head, "prediction": prediction, "answers": list(sample.answers), **scores, **figures}
