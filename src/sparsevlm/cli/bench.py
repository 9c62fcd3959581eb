"""``sparsevlm bench``: what a model gains on this device."""

from __future__ import annotations

import functools
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, prepare_file
from .terminal import progress, quiet_transformers, reports_errors

if TYPE_CHECKING:
    from ..bench.cases import AnyCase
    from ..bench.rounds import Measurement, Settings

_DTYPES = ("float32", "float16", "bfloat16")
ABOUT = (
    "Milliseconds, median; of mixed shapes the mean, behind the library's own warm-up. first token: until it is there, "
    "of pictures from the processor on; /token: of every further one. x: how many times faster than hf-dense in the "
    "same run; floor: times the least that this device can take for what has to be computed and read; GB: taken from "
    "the device, recording included; worst: the slowest call by the median of those of like size. hf-static is "
    "measured where one sample decodes. The weights are {weights}: time depends on the shape, not on them."
)


@reports_errors
def bench(
    *,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="7b or 3b (Qwen2.5-VL's shapes), qwen3-vl-8b, llava-1.5-7b or internvl3-8b (all with random weights), "
            "tiny, a folder, or a hub id.",
        ),
    ] = "7b",
    cases: Annotated[
        str | None,
        typer.Option(
            "--cases",
            help="Such as v1024-b1-n64, picture896-b1-n1 or mixed24 (24 requests of 24 shapes, behind a warm-up that "
            "saw none of them), with commas. Where images have a few sizes, as of LLaVA and InternVL, a case is "
            "measured, and named, by the nearest number of visual tokens that they make; where none are made in code, "
            "only pictures are measured, by the checkpoint's processor.",
            show_default="a core of fourteen",
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All cases.")] = False,
    keep: Annotated[str, typer.Option("--keep", help="Budgets below 1 with commas.")] = "0.25",
    selectors: Annotated[
        str,
        typer.Option(
            "--selectors",
            help="Selectors beside the default, with commas; all: every one; none. Of mixed shapes and pictures only "
            "sparsevlm, the paper's.",
        ),
    ] = "sparsevlm,random",
    vision_keep: Annotated[
        float,
        typer.Option(
            "--vision-keep",
            help="Share that the tower computes in ours-vision; 1: leave that out, as where the engine runs no tower.",
        ),
    ] = 0.5,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8/--no-fp8", help="Measure decode steps that read float8 copies of the weights, as ours-fp8."
        ),
    ] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", help="For timed calls of each provider in a case; three are made in any case.")
    ] = 8.0,
    iterations: Annotated[int, typer.Option("--iterations", help="Timed calls of each provider, at most.", min=1)] = 10,
    warmup: Annotated[int, typer.Option("--warmup", help="Calls before those, at most (three of ours).", min=1)] = 3,
    static: Annotated[
        bool, typer.Option("--static/--no-static", help="Measure transformers' compiled decoding as well (on a GPU).")
    ] = True,
    vllm: Annotated[
        bool,
        typer.Option(
            "--vllm/--no-vllm",
            help="Measure vLLM as well, dense, where it is installed (on a GPU; of Qwen2-VL and Qwen2.5-VL).",
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of pixels, words, shapes and random choices.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = "bfloat16",
    device: Device = "auto",
    attn: Annotated[str, typer.Option("--attn", help="Of hf-dense: sdpa or eager.")] = "sdpa",
    append_to: Annotated[Path | None, typer.Option("--append-to", help="CSV file to add the rows to.")] = None,
    debug: Debug = False,
) -> None:
    """Measure transformers, this library's engine dense, and pruned, in one process and in turn."""
    from ..bench.cases import named_cases
    from ..bench.providers import chosen_selectors
    from ..bench.rounds import NOT_TIMED, Settings
    from ..bench.rows import COLUMNS, append_rows, check_columns
    from ..bench.run import run
    from ..bench.shapes import shape_label
    from ..evaluation.execution.provenance import commit
    from .bench_tables import print_case

    chosen, keeps = named_cases(None if cases is None else _names(cases), full=full), _budgets(keep)
    methods = chosen_selectors(name for name in _names(selectors) if name != "none")
    settings = Settings(keeps, vision_keep, seconds, iterations, warmup, static, seed, methods, fp8)
    target = prepare_file(append_to, ".csv")
    if target is not None:
        check_columns(target, COLUMNS)
    quiet_transformers()
    origin = {"commit": commit(), "command": shlex.join(["sparsevlm", *sys.argv[1:]])}
    place = _Place.of(model, dtype, device, attn)
    origin["model"] = shape_label(model) if place.checkpoint is None else Path(model).name
    of_vllm = _measure_vllm(place, chosen, settings) if vllm else {}
    with progress("loading the model"):
        loaded = place.load()

    def show(case: AnyCase, rows: list[dict[str, str]]) -> None:
        print_case(case, rows)
        if target is not None:
            append_rows(target, rows)

    say = functools.partial(typer.echo, err=True)
    rows = run(loaded, chosen, settings, origin, show, checkpoint=place.checkpoint, vllm=of_vllm, say=say)
    if notes := dict.fromkeys(row["note"] for row in rows if row["note"].startswith(NOT_TIMED)):
        raise ValueError("; ".join(notes))
    typer.echo(ABOUT.format(weights="random" if place.checkpoint is None else f"those of {model}"))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _budgets(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise ValueError(f"--keep must be fractions with commas, such as 0.5,0.25, got {text!r}.") from error
    if not found or not all(0.0 < keep < 1.0 for keep in found):
        raise ValueError(f"--keep must be fractions between 0 and 1, got {text!r}; 1 is always measured.")
    return found


@dataclass(frozen=True)
class _Place:
    """Where the model comes from, and where it goes; ``checkpoint`` is ``None`` for a shape with random weights."""

    model: str
    checkpoint: Path | None
    dtype: str
    device: str
    attn: str

    @classmethod
    def of(cls, model: str, dtype: str, device: str, attn: str) -> _Place:
        from ..bench.shapes import SHAPES
        from ..inputs import checkpoint_folder, pick_device
        from ..inputs.device import check_attention

        if dtype not in _DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
        target = pick_device(device)
        check_attention(attn, target)
        return cls(model, None if model in SHAPES else checkpoint_folder(model), dtype, target, attn)

    def load(self) -> Any:
        import torch

        from ..bench.shapes import random_model
        from ..inputs import load_model

        if self.checkpoint is None:
            return random_model(self.model, self.device, getattr(torch, self.dtype), self.attn)
        return load_model(self.checkpoint, dtype=self.dtype, device=self.device, attn_implementation=self.attn)


def _measure_vllm(place: _Place, cases: Sequence[AnyCase], settings: Settings) -> dict[str, Measurement]:
    """Times of vLLM, where it is installed and there is a GPU: before the model takes memory."""
    import torch
    from transformers import AutoConfig

    from ..bench.checkpoint import MODEL_TYPES, write_checkpoint_files
    from ..bench.shapes import empty_model
    from ..bench.vllm_dense import measure_vllm, vllm_is_installed

    if not vllm_is_installed() or not place.device.startswith("cuda"):
        return {}
    if is_random := place.checkpoint is None:
        with torch.device("meta"):
            config = empty_model(place.model, torch.bfloat16, "sdpa").config
    else:
        config = AutoConfig.from_pretrained(place.checkpoint, local_files_only=True, trust_remote_code=False)
    if config.model_type not in MODEL_TYPES:
        typer.echo(f"vllm-dense: left out; it is measured of {' and '.join(MODEL_TYPES)} only", err=True)
        return {}
    with progress("measuring vLLM, in a process of its own"), tempfile.TemporaryDirectory() as written:
        folder = place.checkpoint or Path(written)
        if is_random:
            write_checkpoint_files(config, folder)
        return measure_vllm(folder, config, cases, settings, dtype=place.dtype, is_random=is_random)
