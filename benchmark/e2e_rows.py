"""Stored rows of ``sparsevlm bench``: reading, the last run of each case at the newest commit, Markdown tables."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

E2E = Path(__file__).parent / "results" / "e2e.csv"
PHASES = {"first_token": "first token", "decode_per_token": "each further token", "total": "whole generate"}
BASE = ("hf-dense", "1.0")
MODEL = "7b shape"  # how the model's name begins in the rows that are shown where no other is named
_OF_MODELS = {"hf-dense": BASE, "ours, keep=0.25": ("ours", "0.25"), "ours-default": ("ours-default", "adaptive")}
MIXED, PICTURES = "mixed", "picture"  # how the names of such cases begin
_NONE = "–"
_NO_ROWS = "No rows yet: `python -m benchmark.bench_e2e` on a GPU adds them.\n"

StoredRow = dict[str, str]
Setting = tuple[str, str]  # provider and keep


def read_e2e(file: Path = E2E) -> list[StoredRow]:
    """Loads all rows of a CSV file; a missing file has none."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def all_of(rows: list[StoredRow], name: str, between: str = ", ") -> str:
    """Lists what rows have in a column, each once; a row that has nothing there is passed over."""
    return between.join(dict.fromkeys(row[name] for row in rows if row[name]))


def measured_on(rows: list[StoredRow], versions: Iterable[str] = ("torch", "transformers"), device: str = "gpu") -> str:
    """Says with what rows were measured.

    Parameters
    ----------
    rows : list of dict
    versions : iterable of str
        Columns of packages.
    device : str
        Column of the device.
    """
    named = ", ".join(f"{name} {all_of(rows, name)}" for name in (*versions, "commit"))
    return f"{all_of(rows, 'dtype')}, {all_of(rows, device)}, {named}"


def of_newest_commit(rows: list[StoredRow]) -> list[StoredRow]:
    """Selects the rows of the commit that was measured last, so that no table mixes those of several."""
    if not rows:
        return []
    newest = max(rows, key=lambda row: row["timestamp"])["commit"]
    return [row for row in rows if row["commit"] == newest]


def last_runs(rows: list[StoredRow]) -> dict[str, dict[Setting, dict[str, StoredRow]]]:
    """Returns the rows of time of each case's last run at the newest commit, by case, provider with keep, and phase.

    All rows of a case in one run have the same time stamp, so that what is compared was measured in turn. Of requests
    of mixed shapes the rows are those of the mean. Cases of one kind come by their sizes.
    """
    return {
        case: {
            setting: {phase: row for (phase, metric), row in found.items() if metric == metric_of(case)}
            for setting, found in settings.items()
        }
        for case, settings in metrics_of_last_runs(rows).items()
    }


def metrics_of_last_runs(rows: list[StoredRow]) -> dict[str, dict[Setting, dict[tuple[str, str], StoredRow]]]:
    """Returns the same rows with all metrics, by phase and metric."""
    rows = of_newest_commit(rows)
    last: dict[str, str] = {}
    for row in rows:
        last[row["case"]] = max(last.get(row["case"], ""), row["timestamp"])
    runs: dict[str, dict[Setting, dict[tuple[str, str], StoredRow]]] = {case: {} for case in _by_size(last)}
    for row in rows:
        if row["timestamp"] == last[row["case"]]:
            of_setting = runs[row["case"]].setdefault((row["provider"], row["keep"]), {})
            of_setting[row["phase"], row["metric"]] = row
    return runs


def _by_size(cases: Iterable[str]) -> list[str]:
    """Cases by the numbers in their names; kinds of cases stay in the order in which they come."""
    kinds = list(dict.fromkeys(map(_kind, cases)))
    return sorted(cases, key=lambda case: (kinds.index(_kind(case)), [int(n) for n in re.findall(r"\d+", case)]))


def _kind(case: str) -> str:
    return re.split(r"\d", case, maxsplit=1)[0]


def metric_of(case: str) -> str:
    """Metric of the rows of time: of requests of mixed shapes their mean, else the median."""
    return "mean_ms" if case.startswith(MIXED) else "ms"


class _Ratios:
    """How many times faster than transformers in the same run: by its own row where there is one (of requests that both
    have answered), else by the medians."""

    def __init__(self, everything: list[StoredRow]) -> None:
        self._base = {
            (row["model"], row["case"], row["timestamp"], row["phase"], row["metric"]): row
            for row in everything
            if (row["provider"], row["keep"]) == BASE
        }

    def cell(self, found: dict[tuple[str, str], StoredRow], case: str, phase: str) -> str:
        """Formats the ratio of a phase of one setting in one case."""
        if (measured := found.get((phase, "x"))) is not None:
            return f"{float(measured['p50']):.2f}"
        row = found.get((phase, metric_of(case)))
        if row is None or not row["p50"] or case.startswith(MIXED):
            return _NONE
        base = self._base.get((row["model"], case, row["timestamp"], phase, row["metric"]))
        return f"{float(base['p50']) / float(row['p50']):.2f}" if base is not None and base["p50"] else _NONE


def e2e_table(rows: list[StoredRow], everything: list[StoredRow] | None = None) -> str:
    """Makes a Markdown table: per case, provider and phase the time, its roofline bound, and the speed-up.

    Parameters
    ----------
    rows : list of dict
        Those to be shown.
    everything : list of dict, optional
        All that are stored, in which transformers' are looked up; ``rows`` where omitted.
    """
    if not rows:
        return _NO_ROWS
    heads = ["case", "provider", "keep"]
    for phase in PHASES.values():
        heads += [f"{phase}, ms", "bound", "x"]
    lines, ratios = _lines(heads), _Ratios(everything or rows)
    for case, settings in metrics_of_last_runs(rows).items():
        for (provider, keep), found in settings.items():
            cells = [case, provider, keep]
            for phase in PHASES:
                row = found.get((phase, metric_of(case)))
                note = "" if row is None or row["p50"] else row["note"]
                bound = _NONE if row is None or not row["floor"] else f"{float(row['floor']):.1f}"
                cells += [note or _figure(row), bound, ratios.cell(found, case, phase)]
            lines.append(_line(cells))
    shown = _shown(rows)
    means = " Of mixed cases: the mean of their calls." if any(row["case"].startswith(MIXED) for row in shown) else ""
    caption = (
        "Medians; bound: the roofline bound, the least that the device can take for what has to be computed and read, "
        "from its measured peaks; x: how many times faster than hf-dense in the same run. "
        f"Cases: visual tokens, batch, new tokens.{means} {_where(shown)}"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def mixed_table(rows: list[StoredRow], everything: list[StoredRow] | None = None) -> str:
    """Makes a Markdown table of requests of mixed shapes: means, the worst call, and the warm-up before."""
    rows = [row for row in rows if row["case"].startswith(MIXED)]
    if not rows:
        return _NO_ROWS
    heads = ["case", "provider", "keep", "whole call, ms", "x", "first token, ms", "x", "worst call", "warm-up, s"]
    lines, ratios, notes = _lines(heads), _Ratios(everything or rows), {}
    for case, settings in metrics_of_last_runs(rows).items():
        for (provider, keep), found in settings.items():
            total = found.get(("total", "mean_ms")) or found.get(("total", "ms"))
            if total is not None and total["note"]:
                notes[f"{provider}: {total['note']}"] = None
            cells = [case, provider, keep]
            for phase in ("total", "first_token"):
                cells += [_figure(found.get((phase, "mean_ms"))), ratios.cell(found, case, phase)]
            worst, warmup = found.get(("total", "worst_by_median")), found.get(("warmup", "seconds"))
            lines.append(_line([*cells, _figure(worst, 2), _figure(warmup)]))
    caption = (
        "Means over all requests, no two of one shape; x: how many times faster than hf-dense was on the requests that "
        "both have answered; worst call: by the median of the calls of like size (eighths of an octave of all tokens); "
        f"warm-up: of other shapes, before. {''.join(f'{note}. ' for note in notes)}{_where(_shown(rows))}"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def pictures_table(rows: list[StoredRow], everything: list[StoredRow] | None = None) -> str:
    """Makes a Markdown table of the time from a decoded picture to the first token, the processor's apart."""
    rows = [row for row in rows if row["case"].startswith(PICTURES)]
    if not rows:
        return _NO_ROWS
    lines = _lines(["case", "provider", "keep", "processor, ms", "picture to first token, ms", "x", "processor"])
    ratios = _Ratios(everything or rows)
    for case, settings in metrics_of_last_runs(rows).items():
        for (provider, keep), found in settings.items():
            row = found.get(("first_token", "ms")) or next(iter(found.values()))
            times = [_figure(found.get((phase, "ms"))) for phase in ("preprocess", "first_token")]
            lines.append(_line([case, provider, keep, *times, ratios.cell(found, case, "first_token"), row["note"]]))
    caption = (
        "Medians; from a decoded square picture of so many pixels a side and a question; x: how many times faster than "
        f"hf-dense in the same run. {_where(_shown(rows))}"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def memory_table(rows: list[StoredRow], everything: list[StoredRow] | None = None) -> str:
    """Makes a Markdown table: per case and provider the most memory that a first call took from the device, in GB.

    Rows of memory have the time stamp of their case's run, as those of time.
    """
    shown = {
        case: {setting: found["total", "bytes"] for setting, found in settings.items() if ("total", "bytes") in found}
        for case, settings in metrics_of_last_runs(rows).items()
    }
    shown = {case: of_setting for case, of_setting in shown.items() if of_setting}
    if not shown:
        return _NO_ROWS
    settings = list(dict.fromkeys(setting for of_setting in shown.values() for setting in of_setting))
    lines = _lines(["case", *(_label(setting) for setting in settings)])
    for case, of_setting in shown.items():
        cells = [f"{float(of_setting[key]['p50']) / 1e9:.1f}" if key in of_setting else _NONE for key in settings]
        lines.append(_line([case, *cells]))
    caption = (
        "GB that torch had taken from the device at most in a first call of a case, weights, recording and compiling "
        f"included. {_where([row for of_setting in shown.values() for row in of_setting.values()])}"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def selectors_table(rows: list[StoredRow], everything: list[StoredRow] | None = None) -> str:
    """Makes a Markdown table: per provider and case the time of the first token, and the speed-up."""
    runs = metrics_of_last_runs(rows)
    if not runs:
        return _NO_ROWS
    ratios = _Ratios(everything or rows)
    lines = _lines(["provider", *(head for case in runs for head in (f"{case}, ms", "x"))])
    for setting in dict.fromkeys(setting for settings in runs.values() for setting in settings):
        cells = [_label(setting)]
        for case, settings in runs.items():
            found = settings.get(setting, {})
            cells += [_figure(found.get(("first_token", "ms"))), ratios.cell(found, case, "first_token")]
        lines.append(_line(cells))
    caption = (
        "First token, medians; x: how many times faster than hf-dense in the same run. Cases: visual tokens, batch, "
        f"new tokens. {_where(_shown(rows))}"
    )
    return "\n".join([*lines, "", caption]) + "\n"


def models_table(rows: list[StoredRow], everything: list[StoredRow] | None = None) -> str:
    """Makes a Markdown table: per model and number of visual tokens the time of the first token, and the speed-up."""
    rows = [row for row in of_newest_commit(rows) if row["phase"] == "first_token" and row["metric"] == "ms"]
    if not rows:
        return _NO_ROWS
    heads = ["model", "visual tokens"]
    for name in _OF_MODELS:
        heads += [f"{name}, ms", *["x"] * (name != "hf-dense")]
    lines, ratios, shown = _lines(heads), _Ratios(everything or rows), []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        shown += _shown(of_model)
        for case, settings in metrics_of_last_runs(of_model).items():
            n_visual = next(iter(next(iter(settings.values())).values()))["n_visual"]
            cells = [model.partition(" shape")[0], n_visual]
            for name, setting in _OF_MODELS.items():
                found = settings.get(setting, {})
                cells.append(_figure(found.get(("first_token", "ms"))))
                cells += [ratios.cell(found, case, "first_token")] * (name != "hf-dense")
            lines.append(_line(cells))
    caption = f"First token, medians; x: how many times faster than hf-dense in the same run. {_where(shown)}"
    return "\n".join([*lines, "", caption]) + "\n"


def _label(setting: Setting) -> str:
    provider, keep = setting
    return provider if keep == "1.0" else f"{provider} {keep}"


def _lines(heads: list[str]) -> list[str]:
    return [_line(heads), "|---" * len(heads) + "|"]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(row: StoredRow | None, places: int = 1) -> str:
    return f"{float(row['p50']):.{places}f}" if row is not None and row["p50"] else _NONE


def _shown(rows: list[StoredRow]) -> list[StoredRow]:
    return [
        row for settings in metrics_of_last_runs(rows).values() for found in settings.values() for row in found.values()
    ]


def _where(rows: list[StoredRow]) -> str:
    versions = ("torch", "triton", "transformers")
    where = f"{all_of(rows, 'model', '; ')}; {measured_on(rows, versions)}"
    return f"{where}; rows with their commands: e2e.csv in benchmark/results."
