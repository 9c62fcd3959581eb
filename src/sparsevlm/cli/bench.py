"""``sparsevlm bench``: what a model gains on this device."""

from __future__ import annotations

import functools
import math
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bundled import BUNDLED
from ..config import did_you_mean
from .busy import BusyWatch
from .options import Debug, Device, Yes, prepare_file
from .terminal import confirm_long, progress, quiet_transformers, reports_errors

if TYPE_CHECKING:
    from ..bench.cases import AnyCase
    from ..bench.rounds import Measurement, Settings

_OF_SHAPES = "bfloat16"  # most checkpoints of these shapes are stored so
_ON_CPU = ("v256-b1-n1", "v256-b1-n16")  # without --cases
_SMALL, _GPU = "bundled or tiny", "cuda"


@reports_errors
def bench(
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="7b or 3b (Qwen2.5-VL's shapes), qwen3-vl-8b, llava-1.5-7b or internvl3-8b (all with random weights), "
            "tiny, bundled, smol, a folder, or a hub id.",
            show_default="7b on a GPU, else bundled",
        ),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            "--cases",
            help="Such as v1024-b1-n64, picture896-b1-n1 or mixed24 (24 requests of 24 shapes, behind a warm-up that "
            "saw none of them), with commas. Where images have a few sizes, as of LLaVA and InternVL, a case is "
            "measured, and named, by the nearest number of visual tokens that they make; where none are made in code, "
            "only pictures are measured, by the checkpoint's processor.",
            show_default="a core of fourteen on a GPU, else two",
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
        float | None,
        typer.Option(
            "--vision-keep",
            help="Share that the tower computes in ours-vision, on the engine; 1: leave that out, as where the engine "
            "runs no tower.",
            show_default="0.5 on a GPU, else 1",
        ),
    ] = None,
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8/--no-fp8",
            help="Measure decode steps that read float8 copies of the weights, as ours-fp8, in cases of up to 16 "
            "samples with further tokens.",
        ),
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            help="For timed calls of each provider in a case; three are made in any case.",
            show_default="8 on a GPU, else 2",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", help="Timed calls of each provider, at most.", min=1)] = 10,
    warmup: Annotated[
        int, typer.Option("--warmup", help="Calls before those, at most (three of the engine's).", min=1)
    ] = 3,
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
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help=f"auto (as stored; of shapes {_OF_SHAPES}), float32, float16 or bfloat16.",
            show_default="bfloat16 on a GPU, else auto",
        ),
    ] = None,
    device: Device = "auto",
    attn: Annotated[str, typer.Option("--attn", help="Of hf-dense: sdpa or eager.")] = "sdpa",
    append_to: Annotated[Path | None, typer.Option("--append-to", help="CSV file to add the rows to.")] = None,
    yes: Yes = False,
    debug: Debug = False,
) -> None:
    """Measure transformers and this library, dense and pruned, in one process and in turn.

    Cases: v1024-b1-n64 has 1024 visual tokens in each prompt, a batch of 1 and
    64 new tokens; picture896-b1-n1 begins at a decoded square picture of 896
    pixels a side; mixed24 are 24 requests, no two of one shape.

    Providers: hf-dense is transformers, hf-flash the same with flash-attn where
    that is installed, hf-static with compiled decoding; vllm-dense is vLLM.
    ours-default is apply_sparsevlm(model) without options, ours-dense with
    keep=1, ours with --keep, ours-NAME with one of --selectors as well. They run
    as such a call does: on a GPU on the engine, on a CPU on hooks around the
    model's own modules, and ours-engine there is ours with engine=True. Always
    on the engine are ours-vision, with --vision-keep too, and ours-fp8, with
    float8 weights.
    """
    busy = BusyWatch()
    from ..bench.cases import named_cases
    from ..bench.estimate import in_words
    from ..bench.providers import chosen_selectors
    from ..bench.rounds import NOT_TIMED, Settings
    from ..bench.rows import COLUMNS, check_columns
    from ..bench.run import run
    from ..bench.shapes import shape_label
    from ..evaluation.execution.provenance import commit
    from .bench_output import Output, about_rows

    place = _Place.of(model, dtype, device, attn)
    few = None if place.on_gpu or full else _ON_CPU
    if cases is not None and not _names(cases):
        raise ValueError("--cases is empty.")
    chosen, keeps = named_cases(few if cases is None else _names(cases), full=full), _budgets(keep)
    methods = chosen_selectors(name for name in _names(selectors) if name != "none")
    seconds = seconds if seconds is not None else 8.0 if place.on_gpu else 2.0
    if not 0.0 <= seconds < math.inf:
        raise ValueError(f"--seconds must be a number of at least 0, got {seconds}.")
    vision_keep = vision_keep if vision_keep is not None else 0.5 if place.on_gpu else 1.0
    if not 0.0 < vision_keep <= 1.0:
        raise ValueError(f"--vision-keep must be a fraction in (0, 1], got {vision_keep}.")
    settings = Settings(keeps, vision_keep, seconds, iterations, warmup, static, seed, methods, fp8)
    target = prepare_file(append_to, ".csv")
    if target is not None:
        check_columns(target, COLUMNS)
    quiet_transformers()
    origin = {"commit": commit(), "command": shlex.join(["sparsevlm", *sys.argv[1:]])}
    origin["model"] = shape_label(place.model) if place.checkpoint is None else Path(place.model).name
    place.check_memory()
    of_vllm = _measure_vllm(place, chosen, settings) if vllm else {}
    with progress("loading the model"):
        loaded = place.load()

    def confirm(seconds: float) -> None:
        confirm_long(seconds, in_words(seconds), "fewer --cases or --selectors, or a smaller --model", yes=yes)

    weights = "random" if place.checkpoint is None else f"those of {place.model}"
    weights = f"{weights}, in {str(loaded.dtype).removeprefix('torch.')}"
    output = Output(place.device, busy, target, about_rows(chosen, weights, on_gpu=place.on_gpu))
    with output:
        rows = run(
            loaded, chosen, settings, origin, output.show_case, checkpoint=place.checkpoint, vllm=of_vllm,
            say=functools.partial(typer.echo, err=True), confirm=confirm, on_step=output.show_step,
        )  # fmt: skip
    if notes := dict.fromkeys(row["note"] for row in rows if row["note"].startswith(NOT_TIMED)):
        raise ValueError("; ".join(notes))


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
    def of(cls, model: str | None, dtype: str | None, device: str, attn: str) -> _Place:
        from ..bench.shapes import SHAPES
        from ..inputs import checkpoint_folder, pick_device
        from ..inputs.checkpoint import DTYPES, SMOL
        from ..inputs.device import check_attention

        if dtype not in (None, *DTYPES):
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        target = pick_device(device)
        check_attention(attn, target)
        of_device = ("7b", "bfloat16") if target.startswith(_GPU) else (BUNDLED, "auto")
        model, dtype = model or of_device[0], dtype or of_device[1]
        if model in SHAPES:
            return cls(model, None, _OF_SHAPES if dtype == "auto" else dtype, target, attn)
        if "/" not in model and model not in (BUNDLED, SMOL) and not Path(model).exists():
            raise FileNotFoundError(
                f"model {model}{did_you_mean(model, SHAPES)} is neither a shape, a folder nor a hub id (owner/name); "
                f"shapes are {', '.join(SHAPES)}, and {BUNDLED} is the small model of this package."
            )
        return cls(model, checkpoint_folder(model), dtype, target, attn)

    @property
    def on_gpu(self) -> bool:
        """Tells whether the device is a GPU that everything is measured on."""
        return self.device.startswith(_GPU)

    def check_memory(self) -> None:
        """Refuse a model for which there is no room.

        Raises
        ------
        ValueError
        """
        import torch

        from ..bench.memory import check_memory
        from ..bench.shapes import empty_model
        from ..inputs.checkpoint import load_skeleton

        if self.checkpoint is None:
            with torch.device("meta"):
                skeleton = empty_model(self.model, getattr(torch, self.dtype), self.attn)
        else:
            skeleton = load_skeleton(self.checkpoint)
            if getattr(skeleton.config, "quantization_config", None) is not None:
                return  # smaller than their dtype tells
        dtype = skeleton.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        check_memory(self.model, skeleton, self.device, dtype, _SMALL)

    def load(self) -> Any:
        import torch

        from ..bench.memory import is_out_of_memory
        from ..bench.shapes import random_model
        from ..inputs import load_model

        try:
            if self.checkpoint is None:
                return random_model(self.model, self.device, getattr(torch, self.dtype), self.attn)
            return load_model(self.checkpoint, dtype=self.dtype, device=self.device, attn_implementation=self.attn)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ValueError(
                f"out of memory with the model {self.model} on {self.device}: name a smaller model, such as {_SMALL}."
            ) from error


def _measure_vllm(place: _Place, cases: Sequence[AnyCase], settings: Settings) -> dict[str, Measurement]:
    """Times of vLLM, where it is installed and there is a GPU: before the model takes memory."""
    import torch
    from transformers import AutoConfig

    from ..bench.checkpoint import MODEL_TYPES, write_checkpoint_files
    from ..bench.shapes import empty_model
    from ..bench.vllm_dense import measure_vllm, vllm_is_installed

    if not vllm_is_installed() or not place.on_gpu:
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
