"""Train the bundled model; see ``training/README.md`` for the commands of its stages."""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevlm.bundled import __file__ as bundled_file
from training.architecture import build_model, cast_weights, grow
from training.data_parallel import DataParallel
from training.evaluate import evaluate
from training.optimiser import whole_model
from training.settings import StageSettings, TrainSettings
from training.step import TrainStep

Settings = TypeVar("Settings", bound=StageSettings)
Result = TypeVar("Result")

_LOG_EVERY = 20.0  # seconds
_SYNC_EVERY = 20  # steps: the host must not run ahead of the wall clock
_SHARD_SIZE = "12MB"


def main() -> None:
    """Command line."""
    train(*parse_arguments(TrainSettings, __doc__))


def parse_arguments(kind: type[Settings], description: str | None) -> tuple[Settings, Path, int, torch.device]:
    """Options of a run: one per field of ``kind``, where to write, hold-out scenes per layout, and the device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--eval-scenes", type=int, default=1000, help="hold-out scenes per layout")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = vars(parser.parse_args())
    out, eval_scenes, device = arguments.pop("out"), arguments.pop("eval_scenes"), arguments.pop("device")
    return kind(**arguments), out, eval_scenes, torch.device(device)


def train(
    settings: TrainSettings, out: Path, eval_scenes: int, device: torch.device
) -> dict[str, dict[str, float]] | None:
    """Run one stage and write the weights, then the accuracy.

    Returns
    -------
    dict
        Hold-out accuracy by layout and task; None in any but the first of several processes.
    """
    started = time.monotonic()
    parallel, device = DataParallel.begin(device)
    prepare(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(Path(bundled_file).parent)
    model = cast_weights(_starting_model(settings).to(device), dtype_of(device))
    step = TrainStep(model, tokenizer, settings, whole_model(model), parallel=parallel)
    return run_stage(step, settings, out, started, lambda: _finish(model, tokenizer, out, eval_scenes))


def prepare(seed: int) -> None:
    """Seed torch, and let float32 products use the tensor cores."""
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True


def dtype_of(device: torch.device) -> torch.dtype:
    """What a model in training computes in."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def run_stage(
    step: TrainStep, settings: StageSettings, out: Path, started: float, finish: Callable[[], Result]
) -> Result | None:
    """Train until the clock or the number of steps ends it; what ``finish`` returns is the last row of the log.

    Of several processes the first writes the log, of what it has seen itself, and finishes; None for the others.
    """
    if step.parallel.rank:
        _loop(step, settings, started, lambda row: None)
        step.end()
        return None
    out.mkdir(parents=True, exist_ok=True)
    with _log_file(out / "log.jsonl") as log:
        processes = step.parallel.world_size
        log({"settings": dataclasses.asdict(settings), "processes": processes, "torch": torch.__version__})
        _loop(step, settings, started, log)
        result = finish()
        log({"steps": step.steps_done, "seconds": time.monotonic() - started, "holdout": result})
    step.end()
    return result


def _starting_model(settings: TrainSettings) -> Qwen2_5_VLForConditionalGeneration:
    if not settings.init:
        return build_model(settings.layers, settings.mlp, settings.rope_theta)
    return grow(Qwen2_5_VLForConditionalGeneration.from_pretrained(settings.init, dtype="float32"), settings.layers)


def _loop(step: TrainStep, settings: StageSettings, started: float, log: Callable[[dict], None]) -> None:
    last_log, last_steps, last_sync = started, 0, 0
    while True:
        if step.steps_done - last_sync >= _SYNC_EVERY and step.seeds.is_cuda:
            torch.cuda.synchronize()
            last_sync = step.steps_done
        now = time.monotonic()
        progress = (now - started) / settings.seconds
        if settings.steps:
            progress = max(progress, step.steps_done / settings.steps)
        progress = step.parallel.agreed(progress)
        done = progress >= 1.0
        if done or now - last_log >= _LOG_EVERY:
            row = {"step": step.steps_done, "seconds": now - started, "rate": float(step.optimiser.rate)}
            row["steps_per_second"] = (step.steps_done - last_steps) / max(now - last_log, 1e-9)
            log(row | {"auxiliary_weight": float(step.auxiliary_weight)} | step.read())
            last_log, last_steps = now, step.steps_done
        if done:
            return
        step.run(rate_factor(settings, step.steps_done, progress), auxiliary_weight(settings, progress))


def rate_factor(settings: StageSettings, step: int, progress: float) -> float:
    """Learning rate as a share of its peak: linear warm-up over steps, times a cosine over progress in [0, 1]."""
    cosine = settings.floor + (1 - settings.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / max(settings.warmup, 1)) * cosine


def auxiliary_weight(settings: StageSettings, progress: float) -> float:
    """Weight of the auxiliary losses: 1 up to ``auxiliary_from``, then linear to 0 at ``auxiliary_until``."""
    if settings.auxiliary_until == 0:
        return 0.0
    fading = settings.auxiliary_until - settings.auxiliary_from
    return min(1.0, max(0.0, (settings.auxiliary_until - progress) / fading))


def _finish(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, out: Path, scenes: int
) -> dict[str, dict[str, float]]:
    """Write bf16 weights first, so that nothing is lost if evaluation fails, then evaluate those weights."""
    model = cast_weights(model, torch.bfloat16).eval()
    model.save_pretrained(out, max_shard_size=_SHARD_SIZE)
    return evaluate(model, tokenizer, scenes) if scenes else {}


class _Log:
    """Rows of JSON to a file and to the terminal."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")

    def __call__(self, row: dict) -> None:
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}
        line = json.dumps(rounded)
        self._file.write(line + "\n")
        self._file.flush()
        print(line, flush=True)

    def close(self) -> None:
        self._file.close()


@contextmanager
def _log_file(path: Path) -> Iterator[_Log]:
    log = _Log(path)
    try:
        yield log
    finally:
        log.close()


if __name__ == "__main__":
    main()
