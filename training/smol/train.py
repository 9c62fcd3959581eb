"""Train smol; see ``training/README.md`` for the commands of its stages."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparsevlm.smol.decoder import Decoder
from training.data_parallel import DataParallel
from training.drawn.packing import Limits
from training.drawn.stream import DrawnBatches, parse_drawn, stream
from training.drawn.tasks import DrawnTasks
from training.drawn.vocabulary import vocabulary, words_of
from training.evaluate import evaluate
from training.groups import TOKEN
from training.replay import TextReplay, perplexity
from training.smol.model import SmolModel
from training.smol.settings import SmolSettings
from training.smol.text import documents, text_windows
from training.step import TrainStep
from training.train import dtype_of, parse_arguments, prepare, run_stage


def main() -> None:
    """Command line."""
    train(*parse_arguments(SmolSettings, __doc__))


def train(
    settings: SmolSettings,
    out: Path,
    eval_scenes: int,
    device: torch.device,
    decoder: Decoder | None = None,
    texts: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Run one stage and write the trained parts, then what they can do.

    Parameters
    ----------
    decoder : Decoder, optional
        Instead of the one that ``settings.source`` names.
    texts : sequence of str
        To replay, and to take words from, instead of :func:`~training.smol.text.documents`.

    Returns
    -------
    dict
        ``accuracy`` on hold-out scenes by layout and task; where the decoder changes, ``perplexity`` on held-out text
        and ``perplexity_original``. None in any but the first of several processes.
    """
    started = time.monotonic()
    parallel, device = DataParallel.begin(device)
    prepare(settings.seed)
    smol = SmolModel(settings, device, dtype_of(device), decoder)
    text = smol.model.model.language_model
    replay, held_out = None, None
    result: dict[str, Any] = {}
    texts = texts or documents()
    drawn = _drawn_tasks(smol, settings, texts, parallel) if settings.drawn else None
    if smol.original is not None:
        replayed, held_out = text_windows(smol.tokenizer, settings.replay_length, texts)
        held_out = held_out[: settings.text_windows]
        result["perplexity_original"] = perplexity(smol.original, held_out)
        replay = TextReplay(
            text, smol.original, replayed, settings.replay_windows, settings.replay_weight, settings.compiled, parallel
        )
    step = TrainStep(smol.model, smol.tokenizer, settings, smol.trained, replay, drawn, parallel)

    def finish() -> dict[str, Any]:
        smol.parts().save(out)
        if held_out is not None:
            result["perplexity"] = perplexity(text, held_out)
        if eval_scenes:
            result["accuracy"] = evaluate(smol.model.eval(), smol.tokenizer, eval_scenes)
        return result

    return run_stage(step, settings, out, started, finish)


def _drawn_tasks(smol: SmolModel, settings: SmolSettings, texts: Sequence[str], parallel: DataParallel) -> DrawnTasks:
    mix = parse_drawn(settings.drawn, settings.photographs)
    limits = Limits(settings.drawn_tokens, smol.model.model.visual.window_size // TOKEN, settings.drawn_longest)
    words, seed = vocabulary(texts, words_of(smol.tokenizer)), settings.seed
    batches = DrawnBatches(mix, smol.tokenizer, limits, words, settings.drawn_questions, seed, parallel)
    ready = stream(batches, settings.drawn_workers)
    ahead, weight = settings.draw_ahead, settings.drawn_weight
    return DrawnTasks(smol.model, ready, limits, mix.families, ahead, weight, settings.compiled)


if __name__ == "__main__":
    main()
