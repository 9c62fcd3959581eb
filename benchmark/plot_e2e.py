"""Plot of the stored rows of whole calls: ``python -m benchmark.plot_e2e`` writes ``docs/images/e2e.png``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmark.e2e_rows import MODEL, PHASES, Setting, StoredRow, last_runs, read_e2e

PLOT = Path(__file__).parent.parent / "docs" / "images" / "e2e.png"
# Cases of equal requests, whose names begin so, and providers; a bar for every selector would be too thin to see.
_CASES = "v"
_PROVIDERS = (
    "hf-dense",
    "hf-static",
    "vllm-dense",
    "ours-dense",
    "ours-default",
    "ours",
    "ours-vision",
    "ours-sparsevlm",
)
_INCHES_PER_CASE = 1.1
_HEIGHT = 3.2


def plot(rows: list[StoredRow], file: Path) -> None:
    """Draws one panel per phase: bars of the medians with p20 and p80, and a line at the roofline bound of each.

    Parameters
    ----------
    rows : list of dict
        Of which those of the 7b shape are drawn.
    file : Path

    Raises
    ------
    ValueError
        If there are no rows.
    """
    rows = [row for row in rows if row["case"].startswith(_CASES) and row["provider"] in _PROVIDERS]
    rows = [row for row in rows if row["model"].startswith(MODEL)]
    if not rows:
        raise ValueError("there are no rows to draw: run python -m benchmark.bench_e2e first.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = last_runs(rows)
    settings = list(dict.fromkeys(setting for of_case in runs.values() for setting in of_case))
    shape = (max(6.0, _INCHES_PER_CASE * len(runs)), _HEIGHT * len(PHASES))
    figure, panels = pyplot.subplots(len(PHASES), 1, figsize=shape, squeeze=False)
    for panel, (phase, title) in zip(panels[:, 0], PHASES.items(), strict=True):
        cases = [case for case, of_case in runs.items() if any(phase in phases for phases in of_case.values())]
        for i, setting in enumerate(settings):
            _bars(panel, runs, cases, setting, phase, i, len(settings))
        panel.set_title(title, loc="left")
        panel.set_yscale("log")
        panel.set_ylabel("ms")
        panel.set_xticks(range(len(cases)), cases, fontsize="small")
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize="small", ncols=4, title="line: roofline bound", loc="lower center")
    origin = next(iter(next(iter(next(iter(runs.values())).values())).values()))
    figure.suptitle(f"{origin['model']}, {origin['dtype']}, {origin['gpu']}", fontsize="medium")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _bars(
    panel: object, runs: dict[str, dict[Setting, dict[str, StoredRow]]], cases: list[str], setting: Setting, phase: str,
    i: int, n: int,
) -> None:  # fmt: skip
    """Draws the bars of one provider in all cases that it has times of."""
    width = 0.8 / n
    rows = {x: runs[case].get(setting, {}).get(phase, {}) for x, case in enumerate(cases)}
    rows = {x + (i - (n - 1) / 2) * width: row for x, row in rows.items() if row.get("p50")}
    middle = [float(row["p50"]) for row in rows.values()]
    below = [float(row["p50"]) - float(row["p20"]) for row in rows.values()]
    above = [float(row["p80"]) - float(row["p50"]) for row in rows.values()]
    provider, keep = setting
    name = provider if keep == "1.0" else f"{provider} {keep}"
    panel.bar(list(rows), middle, width, yerr=[below, above], label=name, error_kw={"linewidth": 0.7})
    bounds = {x: float(row["floor"]) for x, row in rows.items() if row["floor"]}
    starts, ends = ([x + side * width / 2 for x in bounds] for side in (-1, 1))
    panel.hlines(list(bounds.values()), starts, ends, color="black", linewidth=1.2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the plot, to another file if one is given."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    plot(read_e2e(), Path(given[0]) if given else PLOT)


if __name__ == "__main__":
    main()
