"""Tables of the README and the documents: ``python -m benchmark.tables`` rewrites them from the stored rows.

A document marks the place of a table with ``<!-- accuracy: FILTER -->`` and ``<!-- end of accuracy -->``. The filter
names columns of ``results/accuracy.csv`` and the values that its rows must have:
``suite=demo target_layers=default keep=0.5,0.25``; a value that ends in ``*`` stands for all that begin so, and ``or``
stands between filters of which one must hold. With ``e2e``, ``models``, ``selectors``, ``mixed`` or ``pictures`` in
the place of ``accuracy`` the table is one of ``results/e2e.csv``, with ``memory`` one of the bytes in it, with
``ready`` one of ``results/ready.csv``, with ``turns`` one of ``results/turns.csv``, with ``vllm-load``
one of ``results/vllm_load.csv``, with ``server`` one of ``results/server.csv``. Of ``results/e2e.csv`` rows of
the 7b shape are shown, but where a filter names ``model``.

A table of these shows one commit: of the rows that its filter lets through those of the commit that was measured last,
and of these every case's last run. Older rows stay in the file and are shown nowhere; a filter ``commit=...`` names
other ones. So measure all cases at one commit, whose name ``SPARSEVLM_COMMIT`` sets where git is not there.

With ``families`` the table has a column for each kind of task of one model, with ``validity`` rows of
``results/accuracy.csv`` stand beside published ones; both take the newest commit at which all kinds were run. With
``goals`` the table sets what the engine was to reach beside what these rows say.

A figure in a sentence stands between ``<!-- e2e figure: FILTER -->`` (milliseconds), ``<!-- accuracy figure: FILTER
-->`` (retained percent), ``<!-- families figure: FILTER -->`` (its mean over the kinds of tasks) or
``<!-- turns figure: FILTER -->`` (percent answered right) and ``<!-- end -->``; its filter finds one row, of
``families`` one setting. ``<!-- e2e ratio: FILTER -->`` is how many times faster the second provider that it names is
than the first, ``<!-- e2e device: FILTER -->`` the device that the rows were measured on. All of these in one document
are of the 7b shape, and of the newest commit at which each case that they name has hf-dense, ours-dense and ours in one
run on one device, or of the commit that one of them names (``commit=...``); else there is an error that says what is
missing.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmark.e2e_figures import device, measured_together, milliseconds, times_faster
from benchmark.e2e_rows import (
    MODEL,
    StoredRow,
    e2e_table,
    measured_on,
    memory_table,
    mixed_table,
    models_table,
    pictures_table,
    read_e2e,
    selectors_table,
)
from benchmark.families import families_figure, families_table
from benchmark.goals import goals_table
from benchmark.ready_rows import read_ready, ready_table
from benchmark.server_rows import read_server, server_table
from benchmark.turns_rows import read_turns, turns_figure, turns_table
from benchmark.validity import validity_table
from benchmark.vllm_load_rows import read_vllm_load, vllm_load_table
from sparsevlm.evaluation.reporting.csv_rows import read_rows
from sparsevlm.evaluation.settings import AVERAGE
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.selectors import SELECTORS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
_PAGES = ("selectors", "ablation", "engine", "accuracy", "memory", "turns", "validity", "material", "vllm", "serving")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _PAGES))
_BLOCK = re.compile(
    r"(<!-- (?P<kind>accuracy|e2e|families|goals|memory|mixed|models|pictures|ready|selectors|server|turns|validity|"
    r"vllm-load):(?P<filter>.*?) -->\n)"
    r".*?(<!-- end of (?P=kind) -->\n)",
    re.DOTALL,
)
_FIGURE = re.compile(
    r"(<!-- (?P<kind>accuracy figure|families figure|turns figure|e2e figure|e2e ratio|e2e device): "
    r"(?P<filter>[^>]*?) -->)"
    r"[^<]*(<!-- end -->)"
)
_UNKNOWN = "–"


def stored_rows() -> list[StoredRow]:
    """Loads the rows of ``sparsevlm eval ... --append-to benchmark/results/accuracy.csv``."""
    return read_rows(RESULTS / "accuracy.csv")


def chosen(rows: list[StoredRow], filter_text: str) -> list[StoredRow]:
    """Selects the rows that fit a table's filter; of several filters those of the first come first."""
    found = {id(row): row for one in filter_text.split(" or ") for row in _fitting(rows, one)}
    return list(found.values())


def chosen_calls(rows: list[StoredRow], filter_text: str) -> list[StoredRow]:
    """Selects rows of whole calls: of the 7b shape, unless the filter names a model."""
    if "model=" not in filter_text:
        rows = [row for row in rows if row.get("model", MODEL).startswith(MODEL)]
    return chosen(rows, filter_text)


def _fitting(rows: list[StoredRow], filter_text: str) -> list[StoredRow]:
    for condition in filter_text.split():
        name, _, values = condition.partition("=")
        wanted = [value.replace("+", " ") for value in values.split(",")]
        rows = [row for row in rows if any(_fits(row[name], value) for value in wanted)]
    return rows


def _fits(value: str, wanted: str) -> bool:
    return value.startswith(wanted[:-1]) if wanted.endswith("*") else value == wanted


def accuracy_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table: per setting the retained percent of the dense score, on average and by task.

    Raises
    ------
    ValueError
        If there are no rows, or those of several runs that show the same setting differ in what they measured.
    """
    if not rows:
        raise ValueError("no stored row fits the filter of a table")
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task != AVERAGE]
    lines = [
        "| selector | target layers | keep | visual tokens | average | " + " | ".join(tasks) + " |",
        "|---" * (5 + len(tasks)) + "|",
    ]
    settings: dict[tuple[str, ...], dict[str, StoredRow]] = {}
    for row in rows:
        key = (row["selector"], row["target_layers"], row["keep"], row["seed"], row["options"])
        by_task = settings.setdefault(key, {})
        _check_same(by_task.get(row["task"]), row)
        by_task[row["task"]] = row
    for (selector, layers, keep, _, options), by_task in settings.items():
        is_dense = selector == "dense"
        # A run of one task has no average of its own.
        average = by_task.get(AVERAGE) or (by_task.get(tasks[0], {}) if len(tasks) == 1 else {})
        cells = [_score(by_task.get(task, {}), is_dense) for task in tasks]
        overall = _score(average, is_dense) if is_dense else f"**{_score(average, is_dense)}** {_interval(average)}"
        layers_cell = "–" if is_dense or selector == "downsample" else _target_layers(selector, layers)
        lines.append(
            f"| {selector}{f' ({options})' if options else ''} | {layers_cell} | {'–' if is_dense else keep} | "
            f"{_number(average, 'avg_tokens', 0)} of {_number(average, 'n_visual', 0)} | {overall.strip()} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join([*lines, "", _origin(rows)]) + "\n"


def _check_same(before: StoredRow | None, row: StoredRow) -> None:
    """Raises if two runs that show the same setting, such as dense, measured something else."""
    conditions = ("n", "n_visual", "data", "weights", "dtype", "device")
    if before is not None and any(before[name] != row[name] for name in conditions):
        what = ", ".join(name for name in conditions if before[name] != row[name])
        raise ValueError(
            f"runs {before['run']} and {row['run']} both have {row['selector']} on {row['task']}, and differ in "
            f"{what}: narrow the filter"
        )


def _target_layers(selector: str, layers: str) -> str:
    before = selector in SELECTORS and SelectorTraits.of(SELECTORS[selector]()).placement == BEFORE_DECODER
    return "before" if before else layers.replace(" ", ", ")


def _score(row: StoredRow, is_dense: bool) -> str:
    """Dense score in percent, or retained percent of it."""
    if not is_dense:
        return _number(row, "retained", 1)
    return f"{100 * float(row['dense_score']):.1f} %" if row.get("dense_score") else _UNKNOWN


def _interval(row: StoredRow) -> str:
    return f"[{_number(row, 'ci_low', 1)}, {_number(row, 'ci_high', 1)}]" if row.get("ci_low") else ""


def _number(row: StoredRow, name: str, places: int) -> str:
    """Formats a figure of a row, or a dash where the row has none."""
    return f"{float(row[name]):.{places}f}" if row.get(name) else _UNKNOWN


def _origin(rows: list[StoredRow]) -> str:
    n = ", ".join(sorted({row["n"] for row in rows if row["task"] != AVERAGE}, key=int))
    return (
        f"Retained percent of the dense score (of dense: the score), n = {n} hold-out questions a task, 95 % intervals "
        f"of a paired bootstrap; {measured_on(rows, device='device')}; rows with their commands: accuracy.csv "
        "in benchmark/results."
    )


def accuracy_figure(rows: list[StoredRow]) -> str:
    """Formats one retained percentage, for a sentence.

    Raises
    ------
    ValueError
        If there is another number of rows than one.
    """
    if len(rows) != 1:
        raise ValueError(f"a figure needs one stored row, its filter finds {len(rows)}")
    return _number(rows[0], "retained", 1)


def with_tables(text: str) -> str:
    """Replaces the tables and figures in a document's text."""
    whole_calls, accuracy = read_e2e(), stored_rows()
    of_accuracy = {"accuracy": accuracy_table, "families": families_table, "validity": validity_table}
    others = {"ready": (ready_table, read_ready()), "turns": (turns_table, read_turns())}
    others |= {"vllm-load": (vllm_load_table, read_vllm_load()), "server": (server_table, read_server())}
    tables = {
        "e2e": e2e_table, "memory": memory_table, "mixed": mixed_table, "models": models_table,
        "pictures": pictures_table, "selectors": selectors_table,
    }  # fmt: skip

    def table(match: re.Match[str]) -> str:
        if match["kind"] in of_accuracy:
            return match[1] + of_accuracy[match["kind"]](chosen(accuracy, match["filter"])) + match[4]
        if match["kind"] == "goals":
            return match[1] + goals_table(chosen_calls(whole_calls, match["filter"]), others["ready"][1]) + match[4]
        if match["kind"] in others:
            make, rows = others[match["kind"]]
            return match[1] + make(chosen(rows, match["filter"])) + match[4]
        return match[1] + tables[match["kind"]](chosen_calls(whole_calls, match["filter"]), whole_calls) + match[4]

    together = _rows_of_figures(text, whole_calls)

    def sentence(match: re.Match[str]) -> str:
        if match["kind"] in ("accuracy figure", "families figure"):
            figure = accuracy_figure if match["kind"] == "accuracy figure" else families_figure
            return match[1] + figure(chosen(accuracy, match["filter"])) + match[4]
        if match["kind"] == "turns figure":
            return match[1] + turns_figure(chosen(others["turns"][1], match["filter"])) + match[4]
        found = chosen(together, match["filter"])
        if match["kind"] == "e2e ratio":
            return match[1] + times_faster(found, match["filter"]) + match[4]
        return match[1] + (milliseconds if match["kind"] == "e2e figure" else device)(found) + match[4]

    return _FIGURE.sub(sentence, _BLOCK.sub(table, text))


def _rows_of_figures(text: str, rows: list[StoredRow]) -> list[StoredRow]:
    """Rows that all figures of whole calls in a document are read from.

    Raises
    ------
    ValueError
        If a figure names no case.
    """
    filters = [match["filter"] for match in _FIGURE.finditer(text) if match["kind"].startswith("e2e ")]
    by_filter = {one: re.findall(r"\bcase=(\S+)", one) for one in filters}
    if unnamed := [one for one, named in by_filter.items() if not named]:
        raise ValueError(f"a figure of whole calls names its case, as case=v1024-b1-n1; got the filter {unnamed[0]!r}")
    cases = {case for named in by_filter.values() for one in named for case in one.split(",")}
    commits = dict.fromkeys(condition for one in filters for condition in re.findall(r"\bcommit=\S+", one))
    return measured_together(chosen_calls(rows, " ".join(commits)), cases) if cases else []


if __name__ == "__main__":
    for document in DOCUMENTS:
        if document.exists():
            document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
