"""The support matrix: rows that tests have found, as docs/support_matrix.csv and docs/support_matrix.md.

``python -m benchmark.support_matrix ROWS.csv`` takes rows over, in the place of those of the same family and version;
``nox -s support_matrix`` makes them.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

COLUMNS = ("family", "class", "transformers", "mode", "attention", "path", "status", "reason")
DOCS = Path(__file__).parent.parent / "docs"
MATRIX = DOCS / "support_matrix.csv"
SUPPORTED, REFUSED, UNKNOWN = "supported", "refused", "not in transformers"

Row = dict[str, str]

_HEAD = """# Support matrix

What `nox -s support_matrix` has tried: a tiny model of each family at random weights, on a CPU in float32, in each
mode by itself. In every cell that says so the answer equals a dense run in which the dropped tokens are hidden (of
recurrent layers: removed), within 5e-6 of its logits or four times the dense model's own noise. Every cell as a row:
[support_matrix.csv](support_matrix.csv).

**engine** and **hooks** tell the path where the engine is asked for. Where attentions differ, they are named; `flash`
is emulated on a CPU by FlashAttention's rules. A number leads to the reason why transformers itself does not answer,
or why this library refuses.

"""


def read(file: Path = MATRIX, header: bool = True) -> list[Row]:
    """Loads rows; a missing file has none."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines, None if header else COLUMNS))


def main(arguments: Sequence[str] | None = None) -> None:
    """Takes rows over and writes the page."""
    (source,) = sys.argv[1:] if arguments is None else arguments
    new = read(Path(source), header=False)
    found = {_source(row) for row in new}
    rows = sorted([row for row in read(MATRIX) if _source(row) not in found] + new, key=_order)
    with MATRIX.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    MATRIX.with_suffix(".md").write_text(page(rows), encoding="utf-8")


def _source(row: Row) -> tuple[str, str]:
    return row["family"], row["transformers"]


def _order(row: Row) -> tuple[str, ...]:
    return row["family"], row["mode"], row["attention"], row["transformers"]


def page(rows: Iterable[Row]) -> str:
    """Renders the page: a table of families and modes, and the reasons."""
    rows = list(rows)
    by_cell: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_cell.setdefault((row["family"], row["mode"]), []).append(row)
    modes = list(dict.fromkeys(mode for _, mode in by_cell))
    reasons: dict[str, int] = {}
    lines = [f"| class | {' | '.join(modes)} |", "|---" * (len(modes) + 1) + "|"]
    for family, name in _names(rows).items():
        cells = [_cell(by_cell.get((family, mode), []), reasons) for mode in modes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = sorted({row["transformers"] for row in rows}, key=lambda version: [*map(int, version.split("."))])
    lines += ["", f"transformers {' and '.join(versions)}; names of classes without `ForConditionalGeneration`.", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return _HEAD + "\n".join(lines) + "\n"


def _names(rows: Iterable[Row]) -> dict[str, str]:
    """Name of each family: its class, with what tells it apart where others have the same."""
    classes = {row["family"]: row["class"].removesuffix("ForConditionalGeneration") for row in rows}
    several = [name for name, n in Counter(classes.values()).items() if n > 1]
    return {family: f"{name} (`{family}`)" if name in several else name for family, name in classes.items()}


def _cell(rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """What holds in one family and mode: for all attentions and versions, or by those where they differ."""
    by_outcome: dict[str, list[Row]] = {}
    for row in rows:
        outcome = row["path"]
        if row["status"] != SUPPORTED:
            number = reasons.setdefault(row["reason"], len(reasons) + 1)
            outcome = f"{'refused' if row['status'] == REFUSED else '–'} ({number})"
        by_outcome.setdefault(outcome, []).append(row)
    if len(by_outcome) <= 1:
        return next(iter(by_outcome), "")
    return "<br>".join(f"{outcome}: {_which(own, rows)}" for outcome, own in by_outcome.items())


def _which(own: Sequence[Row], rows: Sequence[Row]) -> str:
    """Attentions of some rows out of others; with the version where only one of these is meant."""
    found = []
    for attention in dict.fromkeys(row["attention"] for row in own):
        versions = [row["transformers"] for row in own if row["attention"] == attention]
        every = {row["transformers"] for row in rows if row["attention"] == attention}
        found.append(attention if set(versions) == every else f"{attention} {'/'.join(versions)}")
    return ", ".join(found)


if __name__ == "__main__":
    main()
