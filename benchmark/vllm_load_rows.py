"""Stored rows of ``benchmark.bench_vllm_load`` as a Markdown table."""

from __future__ import annotations

from textwrap import shorten

from benchmark.e2e_rows import E2E, StoredRow, all_of, measured_on, of_newest_commit, read_e2e

VLLM_LOAD = E2E.with_name("vllm_load.csv")
_NONE = "–"
_Setting = tuple[str, str, str, str]
_Figures = dict[tuple[str, str], StoredRow]  # by phase and metric


def read_vllm_load() -> list[StoredRow]:
    """Loads all rows."""
    return read_e2e(VLLM_LOAD)


def vllm_load_table(rows: list[StoredRow]) -> str:
    """Makes a Markdown table of each setting's last run at the newest commit, by the number of clients.

    Raises
    ------
    ValueError
        If the rows are of several devices or models.
    """
    rows = _last_runs(rows)
    if not rows:
        return "No rows yet: `python -m benchmark.bench_vllm_load` on a GPU adds them.\n"
    for name in ("gpu", "model", "vllm"):
        if len(found := {row[name] for row in rows}) > 1:
            raise ValueError(
                f"rows of a table of load differ in {name} ({', '.join(sorted(found))}): narrow the filter"
            )
    settings: dict[_Setting, _Figures] = {}
    for row in rows:
        settings.setdefault(_setting(row), {})[row["phase"], row["metric"]] = row
    lines = [
        "| clients | visual tokens | | keep | prompt tokens | requests a second | new tokens a second | "
        "first token, ms: p50 | p99 | whole answer, ms | choice a request, ms | its share of the time |",
        "|---" * 12 + "|",
    ]
    # A case's settings stand beside each other, as they ran.
    for case in dict.fromkeys(case for case, *_ in settings):
        lines += [_line(setting, found) for setting, found in settings.items() if setting[0] == case]
    return "\n".join([*lines, "", _caption(rows)]) + "\n"


def _line(setting: _Setting, found: _Figures) -> str:
    _, provider, selector, keep = setting
    shared = next(iter(found.values()))
    frames = "" if shared["frames"] == "1" else f" of {shared['frames']} frames"

    def figure(phase: str, metric: str, places: int, column: str = "p50", times: float = 1.0) -> str:
        value = found.get((phase, metric), {}).get(column)
        return f"{times * float(value):.{places}f}" if value else _NONE

    share = figure("choice", "share_of_time", 1, times=100.0)
    cells = [
        figure("prompt", "tokens", 0), figure("load", "requests_per_s", 2), figure("load", "new_tokens_per_s", 0),
        figure("first_token", "ms", 0), figure("first_token", "ms", 0, "p99"),
        figure("total", "ms", 0), figure("choice_per_request", "ms", 2),
        share if share == _NONE else f"{share} %",
    ]  # fmt: skip
    if note := found.get(("load", "requests_per_s"), {}).get("note"):
        cells[0] = shorten(note, 60, placeholder=" …")
    visual = f"{shared['n_visual']}{frames}"
    return f"| {shared['clients']} | {visual} | {selector or provider} | {keep} | {' | '.join(cells)} |"


def _caption(rows: list[StoredRow]) -> str:
    n = [int(row["n"]) for row in rows if row["phase"] == "first_token"]
    answered = f"{min(n)} to {max(n)} answered requests a line" if n else "no request was answered"
    return (
        f"{all_of(rows, 'new_tokens')} new tokens a request, {answered}. {all_of(rows, 'model')}; "
        f"{measured_on(rows, ('vllm', 'torch', 'transformers'))}; rows with their commands: vllm_load.csv in "
        "benchmark/results."
    )


def _last_runs(rows: list[StoredRow]) -> list[StoredRow]:
    """Rows of the newest commit, and of each setting's last run, all of whose rows have one time."""
    rows = sorted(of_newest_commit(rows), key=lambda row: row["timestamp"])
    last = {_setting(row): row["timestamp"] for row in rows}
    return [row for row in rows if row["timestamp"] == last[_setting(row)]]


def _setting(row: StoredRow) -> _Setting:
    return row["case"], row["provider"], row["selector"], row["keep"]
