"""One worker's part of a run: which batches are its own, what is missing of them, and their answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..metrics.scores import score
from ..settings import EvalConfig, Setting
from ..suites.suite import Row, Sample, Suite, chosen_tasks, storable
from .generation import Answer, Answerer, answer_each
from .predictions import Prediction, PredictionStore, Stored

_WARM_UP = 2  # samples
# Decimal places of what is stored.
_ROUNDING = {"avg_tokens": 3, "tflops": 6, "ms": 3}


@dataclass(frozen=True)
class Share:
    """Worker ``index`` of ``count`` takes every ``count``-th batch."""

    index: int = 0
    count: int = 1


def batches(suite: Suite, config: EvalConfig, share: Share) -> Iterator[tuple[int, list[Row]]]:
    """Numbered batches of one task each. Which rows are together depends on neither the workers nor on what is done
    already: selectors that draw at random depend on the number and the place in the batch, and so do last digits."""
    number = 0
    for task in chosen_tasks(suite, config.tasks):
        rows = list(suite.rows(task, config.limit))
        for first in range(0, len(rows), config.batch):
            if number % share.count == share.index:
                yield number, rows[first : first + config.batch]
            number += 1


def run_share(
    config: EvalConfig,
    suite: Suite,
    folder: Path,
    share: Share,
    settings: Sequence[Setting],
    on_rows: Callable[[int], None],
) -> None:
    """Answer what is missing of a worker's batches and store it, batch by batch.

    Parameters
    ----------
    config : EvalConfig
    suite : Suite
    folder : Path
        Of the predictions.
    share : Share
    settings : sequence of Setting
    on_rows : callable
        Called with the number of rows of one setting that have been dealt with.
    """
    store = PredictionStore(folder, share.index)
    stored = store.read()
    answerer = Answerer(config, config.max_new_tokens or suite.max_new_tokens)
    is_warm = False
    for number, batch in batches(suite, config, share):
        missing = {setting.name: _missing(batch, stored.get(setting.name, {})) for setting in settings}
        on_rows(sum(len(batch) - len(rows) for rows in missing.values()))
        if not any(missing.values()):
            continue
        loaded, unusable = _load(batch)
        todo = [setting for setting in settings if missing[setting.name]]
        samples = list(loaded.values())
        if samples and not is_warm:
            _warm_up(answerer, todo, samples)
            is_warm = True
        for setting in todo:
            wanted = missing[setting.name]
            outcomes: dict[str, Any] = dict(unusable)
            # The whole batch again where a kill left a part of it, for the reason that is given at batches.
            if wanted & set(loaded):
                outcomes.update(
                    zip(loaded, answer_each(partial(answerer.answer, setting.drawn(number)), samples), strict=True)
                )
            predictions = [
                _prediction(row, setting, loaded.get(row.id), outcomes[row.id]) for row in batch if row.id in wanted
            ]
            store.append(setting.name, [one for one in predictions if not _is_known(one, stored)])
            on_rows(len(wanted))


def _missing(batch: Sequence[Row], done: dict[tuple[str, str], Prediction]) -> set[str]:
    """Ids of a batch without a score; what failed is tried again, as the file may have been mended."""
    return {row.id for row in batch if "score" not in done.get((row.task, row.id), {})}


def _is_known(prediction: Prediction, stored: Stored) -> bool:
    before = stored.get(prediction["setting"], {}).get((prediction["task"], prediction["id"]))
    return before is not None and before == prediction


def _load(batch: Sequence[Row]) -> tuple[dict[str, Sample], dict[str, Exception]]:
    """Samples by id, and what was raised in place of others."""
    loaded: dict[str, Sample] = {}
    unusable: dict[str, Exception] = {}
    for row in batch:
        try:
            loaded[row.id] = row.load()
        except (ValueError, OSError) as error:
            unusable[row.id] = error
    return loaded, unusable


def _warm_up(answerer: Answerer, settings: Sequence[Setting], samples: list[Sample]) -> None:
    """Answer a little without and with pruning, so that no stored time holds the costs of a first call."""
    for kind in (False, True):
        of_kind = [setting for setting in settings if (setting.pruning is not None) is kind]
        if of_kind:
            with contextlib.suppress(ValueError, RuntimeError):  # a sample at fault is told when its turn comes
                answerer.answer(of_kind[0], samples[:_WARM_UP])


def _prediction(row: Row, setting: Setting, sample: Sample | None, outcome: Answer | Exception) -> Prediction:
    head = {"id": row.id, "task": row.task, "setting": setting.name}
    if isinstance(outcome, Exception):
        said = " ".join(str(outcome).split()) or type(outcome).__name__
        return {**head, "error": storable(said)}  # it may quote the path of a picture
    assert sample is not None  # what has an answer was loaded
    figures = asdict(outcome)
    figures.update((name, round(figures[name], places)) for name, places in _ROUNDING.items())
    prediction = figures.pop("text")
    scores = score(sample.metric, prediction, sample.answers)
    return {**head, "prediction": prediction, "answers": list(sample.answers), **scores, **figures}
