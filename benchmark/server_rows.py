"""Stored rows of ``benchmark.bench_server`` as a Markdown table."""

from __future__ import annotations

from benchmark.e2e_rows import E2E, StoredRow, read_e2e

SERVER = E2E.with_name("server.csv")


def read_server() -> list[StoredRow]:
    """Loads all rows."""
    return read_e2e(SERVER) if SERVER.exists() else []


def server_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table of the last run: throughput by one client, by several at once, and their ratio."""
    if not rows:
        return "No row yet: `python -m benchmark.bench_server` adds one.\n"
    row = max(rows, key=lambda one: one["timestamp"])
    lines = ["| clients | requests a second | new tokens a second | requests a batch |", "|---|---|---|---|"]
    for clients, which in (("1", "one"), (row["clients"], "several")):
        cells = (row[f"{which}_{name}"] for name in ("requests_per_second", "tokens_per_second", "batch"))
        lines.append(f"| {clients} | {' | '.join(cells)} |")
    lines.append(f"| **ratio** | **{row['ratio']}** | | |")
    caption = (
        f"{row['requests']} requests each, {row['max_tokens']} new tokens at most. {row['model']} model; "
        f"{row['device']}, {row['threads']} threads, {row['versions']}, commit {row['commit']}; the row with its "
        "command: server.csv in benchmark/results."
    )
    return "\n".join([*lines, "", caption]) + "\n"
