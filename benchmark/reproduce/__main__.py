"""``python -m benchmark.reproduce --model PATH_OR_ID --table spec|paper``: lmms-eval's tasks under every setting of a
table, each answer kept, and our figures beside published ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.reproduce import checks
from benchmark.reproduce.plan import (
    INPUTS,
    OUTPUTS,
    TABLES,
    Keep,
    Setting,
    Table,
    check_selectors,
    make_settings,
    parse_keep,
)
from benchmark.reproduce.published import fitting
from benchmark.reproduce.report import csv_text, make_lines, markdown
from benchmark.reproduce.runs import Options, estimate, missing_tasks, run_setting
from benchmark.reproduce.store import Fingerprint, Store
from benchmark.validity import read_published
from sparsevlm.bench.estimate import in_words
from sparsevlm.evaluation.execution.run_folder import write_whole

FAILED, REFUSED, INTERRUPTED = 1, 2, 130


@dataclass(frozen=True)
class Run:
    """A table of a checkpoint that is here, and everything that it needs."""

    name: str
    table: Table
    checkpoint: checks.Checkpoint
    settings: list[Setting]
    tasks: dict[str, checks.TaskFiles]
    options: Options
    fingerprints: dict[str, dict[str, Fingerprint]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what is left open is the table's."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.reproduce", description=__doc__)
    parser.add_argument("--model", required=True, help="folder, hub id, or bundled")
    parser.add_argument("--table", required=True, choices=sorted(TABLES))
    parser.add_argument("--tasks", type=_names, help="names with commas, of lmms-eval or of --include-path")
    parser.add_argument("--selectors", type=_names, help="names with commas; downsample: smaller images")
    parser.add_argument("--keep", type=_names, help="budgets with commas: tokens (64), fractions (0.25), presets")
    parser.add_argument("--counted", choices=(INPUTS, OUTPUTS), help="of the decoder's layers: where tokens count")
    parser.add_argument("--limit", type=_positive, help="rows of each task; all where omitted")
    parser.add_argument("--out", type=Path, help="folder of the results; reproduce/<table>-<model> where omitted")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=_positive, default=8)
    parser.add_argument("--processes", type=_positive, default=1, help="copies of the model, each on a GPU of its own")
    parser.add_argument("--include-path", type=Path, help="folder with task files of your own")
    parser.add_argument("--download", action="store_true", help="fetch what is missing of checkpoint and data sets")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    given = parser.parse_args(arguments)
    table = TABLES[given.table]
    given.tasks, given.selectors = given.tasks or table.tasks, given.selectors or table.selectors
    given.counted = given.counted or table.counted
    if given.out is None:
        given.out = Path("reproduce") / f"{given.table}-{checks.short_name(given.model)}"
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, writes ``table.md`` and ``table.csv``, and prints the first."""
    given = parse(arguments)
    try:
        keeps = [parse_keep(one) for one in given.keep] if given.keep else TABLES[given.table].keeps
        checks.check_limit(given.tasks, given.limit)
        check_selectors(given.selectors)
        if given.dry_run:
            return _dry_run(given, keeps)
        store = Store(given.out)
        run = _prepare(given, keeps, checks.find_checkpoint(given.model, given.download))
        _refuse_downloads(run)
        missing = missing_tasks(store, run.settings, run.fingerprints)
        with store.locked():
            _run(run, store, missing)
            return _report(run, store)
    except (ValueError, TypeError, FileNotFoundError, NotImplementedError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"interrupted; what was done is in {given.out}, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED


def _prepare(given: argparse.Namespace, keeps: Sequence[Keep], folder: Path) -> Run:
    table = TABLES[given.table]
    checkpoint = checks.describe_checkpoint(given.model, folder, table)
    settings = make_settings(given.selectors, keeps, given.counted, table.n_visual, checkpoint.n_layers)
    checks.check_settings(checkpoint, settings)
    tasks = checks.find_tasks(given.tasks, given.include_path)
    sized = {"n_visual": table.n_visual} if checkpoint.sizes_images else {}
    shared = {
        "pretrained": given.model if given.model == checks.BUNDLED else str(folder.resolve()),
        **sized,
        "dtype": checks.dtype_of(folder, given.device),
        "device": given.device,
        "batch_size": given.batch_size,
    }
    options = Options(shared, given.include_path, given.limit, given.processes, given.download)
    origin = checks.provenance(checkpoint, given.device)
    found = {
        setting.name: checks.fingerprints(origin, {**sized, **setting.arguments}, tasks, given.limit)
        for setting in settings
    }
    return Run(f"{given.table}, {checks.short_name(given.model)}", table, checkpoint, settings, tasks, options, found)


def _refuse_downloads(run: Run) -> None:
    data_sets = checks.missing_data_sets(run.tasks)
    if data_sets and not run.options.download:
        raise FileNotFoundError(
            f"data sets {', '.join(data_sets)} are not here: --download lets lmms-eval fetch them from the hub, which "
            "asks for a token for some (hf auth login); --tasks leaves tasks out."
        )
    if data_sets:
        print(f"fetched on the way: data sets {', '.join(data_sets)}", file=sys.stderr)


def _run(run: Run, store: Store, missing: Mapping[str, Sequence[str]]) -> None:
    for setting in run.settings:
        if tasks := missing.get(setting.name):
            _, seconds = estimate(store, _from(run, missing, setting), run.options.limit)
            rest = "" if seconds is None else f"; all that is left takes {in_words(seconds)}"
            print(f"{setting.name}: {', '.join(tasks)}{rest}", file=sys.stderr, flush=True)
            wanted = {task: run.fingerprints[setting.name][task] for task in tasks}
            run_setting(store, setting, wanted, run.options)


def _from(run: Run, missing: Mapping[str, Sequence[str]], first: Setting) -> dict[str, Sequence[str]]:
    """What is missing of a setting and those behind it."""
    names = [setting.name for setting in run.settings]
    return {name: missing[name] for name in names[names.index(first.name) :] if name in missing}


def _report(run: Run, store: Store) -> int:
    failed = {
        (setting.name, task): reason.splitlines()[-1]
        for setting in run.settings
        for task in run.tasks
        if (reason := store.failure(setting.name, task)) is not None
    }
    model = checks.short_name(run.checkpoint.name)
    published = fitting(read_published(), model)
    lines = make_lines(run.settings, tuple(run.tasks), store)
    page = markdown(run.name, lines, tuple(run.tasks), published, run.table.n_visual, failed)
    write_whole(store.folder / "table.md", page)
    write_whole(store.folder / "table.csv", csv_text(model, lines, tuple(run.tasks), published, run.table.n_visual))
    print(page)
    for name, task in failed:
        print(f"failed: {name}, {task}: {store.error_file(name, task)}", file=sys.stderr)
    return FAILED if failed else 0


def _dry_run(given: argparse.Namespace, keeps: Sequence[Keep]) -> int:
    """Says what would run; of a checkpoint that is not here, by what is known without."""
    table = TABLES[given.table]
    try:
        folder = checks.find_checkpoint(given.model, download=False)
    except FileNotFoundError as error:
        print(f"would be refused, or fetched with --download: {error}")
        n_layers = checks.n_layers_of(given.model)
        settings = make_settings(given.selectors, keeps, given.counted, table.n_visual, n_layers)
        shared = {"pretrained": given.model, "n_visual": table.n_visual, "batch_size": given.batch_size}
        options = Options(shared, given.include_path, given.limit, given.processes, given.download)
        missing = {setting.name: list(given.tasks) for setting in settings}
    else:
        run = _prepare(given, keeps, folder)
        settings, options, n_layers = run.settings, run.options, run.checkpoint.n_layers
        missing = missing_tasks(Store(given.out), settings, run.fingerprints)
        if data_sets := checks.missing_data_sets(run.tasks):
            print(f"would be refused, or fetched with --download: data sets {', '.join(data_sets)}")
    print("\n".join(plan_lines(settings, table.n_visual, n_layers)))
    print("\nSettings run one after another, as these commands of lmms-eval would, with the model loaded once each:\n")
    for setting in settings:
        if tasks := missing.get(setting.name):
            print(options.command(setting, tasks))
    n_rows, seconds = estimate(Store(given.out), missing, given.limit)
    rows = "an unknown number of" if n_rows is None else str(n_rows)
    time = f", {in_words(seconds)} by what is stored in {given.out}" if seconds is not None else ""
    n_missing = sum(map(len, missing.values()))
    print(f"\n{n_missing} of {len(settings) * len(given.tasks)} results are missing, {rows} answers{time}")
    return 0


def plan_lines(settings: Sequence[Setting], n_visual: int, n_layers: int) -> list[str]:
    """A table of the budgets, as in the documents."""
    lines = [
        f"Of {n_visual} visual tokens in {n_layers} layers:",
        "",
        "| row | arguments | leave the target layers | at layer inputs | at layer outputs |",
        "|---" * 5 + "|",
    ]
    for setting in settings:
        cells = [setting.name, f"`{setting.arguments_text}`", "–", "–", "–"]
        if (plan := setting.planned) is not None:
            cells[2:] = [", ".join(map(str, plan.counts)), f"{plan.at_inputs:.1f}", f"{plan.at_outputs:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
