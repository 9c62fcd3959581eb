"""``sparsevlm bench``: what a model gains on this device."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, prepare_file
from .terminal import progress, quiet_transformers, reports_errors

if TYPE_CHECKING:
    from ..bench.cases import Case

_DTYPES = ("float32", "float16", "bfloat16")
ABOUT = (
    "Milliseconds, median. first token: until it is there; /token: of every further one. x: how many times faster than "
    "hf-dense in the same run; floor: times the least that this device can take for what has to be computed and read; "
    "GB: taken from the device, recording included. hf-static is measured where one sample decodes. The weights are "
    "{weights}: time depends on the shape, not on them."
)


@reports_errors
def bench(
    *,
    model: Annotated[
        str,
        typer.Option("--model", help="7b or 3b (Qwen2.5-VL's shapes, random weights), tiny, a folder, or a hub id."),
    ] = "7b",
    cases: Annotated[
        str | None, typer.Option("--cases", help="Such as v1024-b1-n64, with commas.", show_default="a core of twelve")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All cases.")] = False,
    keep: Annotated[str, typer.Option("--keep", help="Budgets below 1 with commas, three at most.")] = "0.25",
    vision_keep: Annotated[
        float, typer.Option("--vision-keep", help="Share that the tower computes in ours-vision; 1: leave that out.")
    ] = 0.5,
    seconds: Annotated[
        float, typer.Option("--seconds", help="For timed calls of each provider in a case; three are made in any case.")
    ] = 8.0,
    iterations: Annotated[int, typer.Option("--iterations", help="Timed calls of each provider, at most.", min=1)] = 10,
    warmup: Annotated[int, typer.Option("--warmup", help="Calls before those, at most.", min=1)] = 3,
    static: Annotated[
        bool, typer.Option("--static/--no-static", help="Measure transformers' compiled decoding as well (on a GPU).")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of pixels, words and random choices.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = "bfloat16",
    device: Device = "auto",
    attn: Annotated[str, typer.Option("--attn", help="Of hf-dense: sdpa or eager.")] = "sdpa",
    append_to: Annotated[Path | None, typer.Option("--append-to", help="CSV file to add the rows to.")] = None,
    debug: Debug = False,
) -> None:
    """Measure transformers, this library's engine dense, and pruned, in one process and in turn."""
    from ..bench.cases import named_cases
    from ..bench.rounds import NOT_TIMED, Settings
    from ..bench.rows import COLUMNS, append_rows, check_columns
    from ..bench.run import run
    from ..evaluation.execution.provenance import commit

    names = None if cases is None else tuple(name.strip() for name in cases.split(",") if name.strip())
    chosen, keeps = named_cases(names, full=full), _budgets(keep)
    settings = Settings(keeps, vision_keep, seconds, iterations, warmup, static, seed)
    target = prepare_file(append_to, ".csv")
    if target is not None:
        check_columns(target, COLUMNS)
    quiet_transformers()
    with progress("loading the model"):
        loaded, is_random = _load(model, dtype, device, attn)
    origin = {"commit": commit(), "command": shlex.join(["sparsevlm", *sys.argv[1:]])}
    origin["model"] = f"{model} shape, random weights" if is_random else Path(model).name

    def show(case: Case, rows: list[dict[str, str]]) -> None:
        _print(case, rows)
        if target is not None:
            append_rows(target, rows)

    rows = run(loaded, chosen, settings, origin, show)
    if notes := dict.fromkeys(row["note"] for row in rows if row["note"].startswith(NOT_TIMED)):
        raise ValueError("; ".join(notes))
    typer.echo(ABOUT.format(weights="random" if is_random else f"those of {model}"))


def _budgets(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise ValueError(f"--keep must be fractions with commas, such as 0.5,0.25, got {text!r}.") from error
    if not found or not all(0.0 < keep < 1.0 for keep in found):
        raise ValueError(f"--keep must be fractions between 0 and 1, got {text!r}; 1 is always measured.")
    return found


def _load(model: str, dtype: str, device: str, attn: str) -> tuple[Any, bool]:
    import torch

    from ..bench.shapes import SHAPES, random_model
    from ..inputs import load_model, pick_device
    from ..inputs.device import check_attention

    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if model in SHAPES:
        target = pick_device(device)
        check_attention(attn, target)
        return random_model(model, target, getattr(torch, dtype), attn), True
    return load_model(model, dtype=dtype, device=device, attn_implementation=attn), False


def _print(case: Case, rows: list[dict[str, str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True, title=case.name, title_justify="left")
    for head in ("provider", "keep"):
        table.add_column(head)
    for head in ("vision", "prefill", "first token", "x", "floor", "/token", "total", "x", "GB"):
        table.add_column(head, justify="right", no_wrap=True)
    of: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for row in rows:
        of.setdefault((row["provider"], row["keep"]), {})[row["phase"], row["metric"]] = row
    base = of.get(("hf-dense", "1.0"), {})
    for (provider, keep), found in of.items():
        if note := found["total", "ms"]["note"]:
            table.add_row(provider, keep, note)
            continue
        first, total = found["first_token", "ms"], found["total", "ms"]
        per_token = found.get(("decode_per_token", "ms"))
        peak = found.get(("total", "bytes"))
        table.add_row(
            provider,
            keep,
            *(_number(found[phase, "ms"]["p50"]) for phase in ("vision", "prefill", "first_token")),
            _ratio(base.get(("first_token", "ms"), {}).get("p50"), first["p50"]),
            _ratio(first["p50"], first["floor"]),
            "" if per_token is None else _number(per_token["p50"]),
            _number(total["p50"]),
            _ratio(base.get(("total", "ms"), {}).get("p50"), total["p50"]),
            "" if peak is None else f"{float(peak['p50']) / 1e9:.2f}",
        )
    # Wide enough for a log file; a terminal shows what fits.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _number(text: str) -> str:
    return f"{float(text):.1f}" if text else ""


def _ratio(above: str | None, below: str) -> str:
    return f"{float(above) / float(below):.2f}" if above and below else ""
