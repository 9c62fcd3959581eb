"""Stored rows of ``benchmark.bench_ready`` as a Markdown table."""

from __future__ import annotations

from benchmark.e2e_rows import E2E, StoredRow, all_of, measured_on, of_newest_commit, read_e2e

READY = E2E.with_name("ready.csv")
_NONE = "–"
FILLED, EMPTY = "Triton's cache filled", "Triton's cache empty"


def read_ready() -> list[StoredRow]:
    """Loads all rows."""
    return read_e2e(READY)


def ready_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table of the newest commit's last run: what a call took with Triton's cache filled and empty."""
    rows = of_newest_commit(rows)
    if not rows:
        return "No rows yet: `python -m benchmark.bench_ready` on a GPU adds them.\n"
    last = max(row["timestamp"] for row in rows)
    rows = [row for row in rows if row["timestamp"] == last]
    lines = ["| call | what | cache filled | cache empty |", "|---|---|---|---|"]
    found: dict[tuple[str, str, str, str], dict[str, StoredRow]] = {}
    for row in rows:
        key = (row["provider"], row["operation"], row["shape"], row["metric"])
        found.setdefault(key, {})[row["timing"]] = row
    for (provider, operation, shape, _), by_cache in found.items():
        cells = [_figure(by_cache.get(cache)) for cache in (FILLED, EMPTY)]
        lines.append(f"| {provider} | {operation}, {shape} | {' | '.join(cells)} |")

    caption = (
        f"One call each. {all_of(rows, 'note')}; {measured_on(rows, ('torch', 'triton', 'transformers'))}; "
        "rows with their commands: ready.csv in benchmark/results."
    )
    return "\n".join([*lines, "", caption]) + "\n"


def _figure(row: StoredRow | None) -> str:
    if row is None or not row["p50"]:
        return _NONE
    value = float(row["p50"])
    if row["metric"] == "bytes":
        return f"{value / 1e9:.1f} GB"
    return f"{value / 1e3:.1f} s" if value >= 1e3 else f"{value:.0f} ms"
