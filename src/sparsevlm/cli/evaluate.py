"""``sparsevlm eval``: selectors and budgets under one protocol."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .busy import BusyWatch
from .options import Debug, Device, Yes, parse_keep, parse_layers
from .terminal import confirm_long, quiet_transformers, reports_errors

if TYPE_CHECKING:
    from ..evaluation import EvalConfig, Evaluation, EvaluationRun

# Exit codes.
INTERRUPTED, FAILED_ROWS = 130, 3
SHOWN_FAILURES = 10
LINE_SECONDS = 60


@dataclass(frozen=True)
class _Defaults:
    """Options of a device that are not given: a comparison of minutes on each."""

    selectors: str
    keep: str
    scenes: int
    batch: int

    def selectors_at(self, target_layers: str | None) -> str:
        """Selectors for these target layers, if any: there ``span`` takes the place of its like before the decoder."""
        return self.selectors if target_layers is None else self.selectors.replace("span-features", "span")


_ON_GPU = _Defaults("all", "0.5,0.37,0.25", 500, 32)
_ON_CPU = _Defaults("span-features,sparsevlm,random", "0.5,0.25", 20, 8)


@reports_errors
def evaluate(
    *,
    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            help="demo, demo-<layout>, grounds, grounds-<ground>, documents, charts, screens, whole, chat, a .jsonl or "
            ".parquet file, or lmms:TASK[,TASK] for lmms-eval's tasks.",
        ),
    ] = "demo",
    model: Annotated[str, typer.Option("--model", help="Folder, hub id, 'bundled' or 'smol'.")] = "bundled",
    selectors: Annotated[
        str | None,
        typer.Option(
            "--selectors",
            help="Names with commas (downsample: smaller pictures), or all.",
            show_default=f"all on a GPU, else {_ON_CPU.selectors}",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            help="Budgets with commas: fractions (0.25), tokens (64), or adaptive.",
            show_default=f"{_ON_GPU.keep} on a GPU, else {_ON_CPU.keep}",
        ),
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="With commas.", show_default="all")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            help="Rows per task.",
            min=1,
            show_default=f"all; {_ON_GPU.scenes} scenes, on a CPU {_ON_CPU.scenes}",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Of selectors that draw at random, with commas.")] = "0",
    first_seed: Annotated[
        int | None,
        typer.Option("--first-seed", help="First seed of what is drawn; below 1000000.", show_default="500000"),
    ] = None,
    target_layers: Annotated[
        str | None,
        typer.Option(
            "--target-layers",
            help="Such as 2,6,10; not for selectors before the decoder.",
            show_default="every 4th from 2",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with task files for lmms-eval.")
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another option of SparseVLMConfig, as name=value; may be given several times."),
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", help="exact, vqa, anls, relaxed or iou, for rows of a file that name none.")
    ] = "exact",
    instruction: Annotated[str, typer.Option("--instruction", help="Text appended to every question.")] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, show_default="what the suite needs")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            help="Rows answered at once.",
            min=1,
            show_default=f"{_ON_GPU.batch} on a GPU, else {_ON_CPU.batch}",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes that share the device.", min=1)] = 1,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (float32 on a CPU, else as stored), float32, float16 or bfloat16.")
    ] = "auto",
    device: Device = "auto",
    attn: Annotated[str, typer.Option("--attn", help="sdpa, eager or flash_attention_2.")] = "sdpa",
    out: Annotated[Path, typer.Option("--out", help="Where run folders are.")] = Path("runs"),
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run of the same configuration, or start anew.")
    ] = True,
    append_to: Annotated[
        Path | None,
        typer.Option("--append-to", help="CSV file to add the rows to, in place of the same run's."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help=f"Exit with code {FAILED_ROWS} if a row is without a score.")
    ] = False,
    yes: Yes = False,
    debug: Debug = False,
) -> None:
    """Compare selectors and budgets with the dense model on a suite of questions."""
    busy = BusyWatch()
    from ..evaluation import EvalConfig
    from ..evaluation.execution.workers import threads_of_each
    from ..evaluation.suites.registry import is_drawn
    from ..inputs import pick_device

    target = pick_device(device)
    default = _ON_GPU if target.startswith("cuda") else _ON_CPU
    if limit is None and default is _ON_CPU and is_drawn(suite):
        limit = default.scenes
    config = EvalConfig(
        suite=suite,
        model=model,
        selectors=_names("--selectors", default.selectors_at(target_layers) if selectors is None else selectors),
        keeps=tuple(parse_keep(one) for one in _names("--keep", default.keep if keep is None else keep)),
        seeds=_numbers("--seeds", seeds),
        tasks=None if tasks is None else _names("--tasks", tasks),
        limit=limit,
        first_seed=first_seed,
        batch=batch or default.batch,
        dtype=dtype,
        device=device,
        attn=attn,
        max_new_tokens=max_new_tokens,
        instruction=instruction,
        metric=metric,
        target_layers=parse_layers(target_layers),
        include_path=None if include_path is None else str(include_path),
        options=_settings(options or []),
    )
    of_workers = () if workers == 1 else (workers * threads_of_each(workers), "Choose fewer --workers.")
    run = _prepared(config, out)
    busy.warn(target, *of_workers)
    evaluation = _execute(run, yes=yes, workers=workers, resume=resume, collect=append_to)
    _print(evaluation)
    busy.warn(target, *of_workers)
    if strict and evaluation.failed:
        sys.exit(FAILED_ROWS)


def _prepared(config: EvalConfig, out: Path) -> EvaluationRun:
    from ..evaluation import EvaluationRun

    quiet_transformers()
    try:
        return EvaluationRun(config, out)
    except ModuleNotFoundError as error:  # of an extra; the message has the pip line
        raise ValueError(str(error)) from error


def _execute(run: EvaluationRun, *, yes: bool, **options: Any) -> Evaluation:
    from ..bench.estimate import in_words

    try:
        with _counter(run.n_total) as (advance, paused):

            def confirm(seconds: float) -> None:
                with paused():
                    typer.echo(f"the rest takes {in_words(seconds)}", err=True)
                    confirm_long(seconds, in_words(seconds), "fewer --selectors or --keep, or a --limit", yes=yes)

            return run.execute(command=["sparsevlm", *sys.argv[1:]], on_rows=advance, confirm=confirm, **options)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; what was done is in {run.folder}, and the same command goes on from there", err=True)
        sys.exit(INTERRUPTED)


@contextmanager
def _counter(total: int) -> Iterator[tuple[Callable[[int], None], Callable[[], AbstractContextManager[Any]]]]:
    """A bar with the remaining time on a terminal, a line every minute elsewhere; and a context that it pauses in."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if console.is_terminal:
        columns = [
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        ]
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task("", total=total)

            @contextmanager
            def paused() -> Iterator[None]:
                bars.stop()
                yield
                bars.start()

            yield lambda n_rows: bars.advance(task, n_rows), paused
        return
    done, last = 0, time.monotonic()
    typer.echo(f"evaluating {total} answers", err=True)

    def advance(n_rows: int) -> None:
        nonlocal done, last
        done += n_rows
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            typer.echo(f"{done} of {total} answers", err=True)

    yield advance, nullcontext


def _print(evaluation: Evaluation) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.reporting.results import left_out, not_averaged
    from ..evaluation.reporting.table import summary_cells

    heads, cells = summary_cells(evaluation.results)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
    for head in heads:
        table.add_column(head, justify="left" if head == "selector" else "right", no_wrap=True)
    for cell_row in cells:
        table.add_row(*cell_row)
    # Wide enough for a log file; a terminal shows what fits.
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    typer.echo("score and retained: means of the tasks, which table.md shows one by one, with what intervals tell")
    for line in (*left_out(evaluation.unsupported), *not_averaged(evaluation.results)):
        typer.echo(line, err=True)
    for (task, row), text in list(evaluation.failed.items())[:SHOWN_FAILURES]:
        typer.echo(f"no score: {task}, {row}: {text}", err=True)
    if (more := len(evaluation.failed) - SHOWN_FAILURES) > 0:
        typer.echo(f"no score: {more} more rows, see table.md", err=True)
    typer.echo(f"wrote {evaluation.folder}: table.md, metrics.csv, plot.png, plot.svg, predictions/")


def _names(option: str, text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"{option} is empty.")
    return names


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(option, text))
    except ValueError as error:
        raise ValueError(f"{option} must be whole numbers with commas, such as 0,1,2, got {text!r}.") from error


def _settings(assignments: list[str]) -> dict[str, Any]:
    """Values of ``--set name=value``: JSON where it is some, else text."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set must be name=value, such as recycle=false, got {assignment!r}.")
        try:
            values[name.strip()] = json.loads(text)
        except ValueError:
            values[name.strip()] = text
    return values
