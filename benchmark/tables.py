"""Tables of the README from stored rows: ``python -m benchmark.tables`` rewrites them in place."""

from __future__ import annotations

import csv
from pathlib import Path

from .provenance import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- accuracy: python -m benchmark.tables -->\n", "<!-- end of accuracy -->\n"


def rows() -> list[dict[str, str]]:
    """Stored rows of the bundled model's accuracy."""
    with (RESULTS / "demo_accuracy.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def accuracy_table() -> str:
    """One line per task, target layers and budget: dense, pruned, random."""
    found = rows()
    dense = {(row["task"], row["target_layers"]): row for row in found if row["selector"] == "dense"}
    settings = sorted(
        {(row["task"], row["keep"], row["target_layers"]) for row in found if row["selector"] == "sparsevlm"},
        key=lambda setting: (setting[2] == "default", setting[0] != "number", setting[1]),
    )
    lines = [
        "| task | target layers | budget | visual tokens (average over layers) | dense | sparsevlm | random | n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, keep, layers in settings:
        by_selector = {
            row["selector"]: row
            for row in found
            if (row["task"], row["keep"], row["target_layers"]) == (task, keep, layers)
        }
        ours, random = by_selector["sparsevlm"], by_selector.get("random")
        lines.append(
            f"| {task} | {layers.replace(' ', ', ')} | {keep} | {float(ours['avg_tokens']):.0f} of 256 | "
            f"{percent(dense[task, layers])} | {percent(ours)} | {percent(random) if random else '–'} | {ours['n']} |"
        )
    first = found[0]
    origins = sorted({row["commit"] for row in found})
    where = f"{first['dtype']}, {first['device']}, torch {first['torch']}, transformers {first['transformers']}"
    lines += [
        "",
        f"Exact match on hold-out scenes (seeds from {first['first_seed']}), {where}, commit {', '.join(origins)}; "
        "rows with their commands: [demo_accuracy.csv](benchmark/results/demo_accuracy.csv).",
    ]
    return "\n".join(lines) + "\n"


def percent(row: dict[str, str]) -> str:
    """A score as it is shown."""
    return f"{100 * float(row['score']):.1f} %"


def with_table(text: str) -> str:
    """The README's text with its table made anew."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + accuracy_table() + END + tail


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
