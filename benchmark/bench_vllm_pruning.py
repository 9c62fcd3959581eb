"""vLLM dense and with the plugin, on one device, with random weights of a published shape.

``python -m benchmark.bench_vllm_pruning`` starts one engine without the plugin's options and one with them, each in a
process of its own, and appends rows to ``results/vllm.csv``: the first token of one request, and 1, 8 and 32 requests
that come together, each with a new image; preprocessing of images stands apart, as it does not depend on the plugin.
``--shape tiny`` tries it out on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.commands import command_of
from benchmark.timed import RESULTS
from benchmark.vllm_setup import (
    Setting,
    dtype,
    environment,
    model_config,
    n_kept,
    origin_columns,
    percentiles,
    pruning_settings,
    setting_columns,
)
from sparsevlm.bench.checkpoint import write_checkpoint_files
from sparsevlm.bench.rows import Row, append_rows, check_columns
from sparsevlm.selection.selectors import DEFAULT

COLUMNS = (
    *("case", "provider", "selector", "keep", "requests", "n_visual", "n_kept", "n_text", "new_tokens", "phase"),
    *("metric", "p50", "p20", "p80", "p99", "n", "model", "dtype", "gpu", "torch", "triton", "transformers", "vllm"),
    *("commit", "command", "timestamp", "note"),
)
_TEXT = 40


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and appends the rows."""
    given = _parse(arguments)
    check_columns(given.append_to, COLUMNS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        config = model_config(given.shape)
        write_checkpoint_files(config, folder)
        for cases in (list(_cases(given, [None])), list(_cases(given, pruning_settings(given.keep, given.selectors)))):
            job = _job(given, folder, config, cases)
            found = _run(job, Path(place))
            rows += [row for case, one in zip(cases, found, strict=True) for row in _rows(given, case, one)]
    command = command_of("bench_vllm_pruning", sys.argv[1:] if arguments is None else arguments)
    shared = origin_columns(given.shape, command)
    rows = [{**dict.fromkeys(COLUMNS, ""), **row, **shared} for row in rows]
    append_rows(given.append_to, rows)
    for row in rows:
        print(*(row[name] or "-" for name in ("case", "selector", "keep", "phase", "metric", "p50", "p99", "note")))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmark.bench_vllm_pruning", description=__doc__)
    parser.add_argument("--shape", default="7b", help="7b, 3b, or tiny to try the script out")
    parser.add_argument("--selectors", default=f"{DEFAULT},cdpruner,mmtok,grid")
    parser.add_argument("--keep", default="0.5,0.25", help="fractions")
    parser.add_argument("--visual", default="1024,4096", help="visual tokens of the image of one request, squares")
    parser.add_argument("--requests", default="1,8,32", help="that come together, with as many visual tokens as first")
    parser.add_argument("--new-tokens", type=int, default=64, help="of requests that come together")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, JSON")
    parser.add_argument("--append-to", type=Path, default=RESULTS / "vllm.csv")
    return parser.parse_args(arguments)


def _cases(given: argparse.Namespace, settings: Sequence[Setting]) -> Iterator[dict[str, Any]]:
    visual = [int(n) for n in given.visual.split(",")]
    calls = [(f"first token, {n} visual", n, 1, 1) for n in visual]
    for n in given.requests.split(","):
        calls.append((f"{n} together", visual[0], int(n), given.new_tokens))
    for options in settings:
        for name, n_visual, requests, new_tokens in calls:
            side = round(n_visual**0.5)
            yield {
                "name": name, "grid": [side, n_visual // side], "requests": requests, "new_tokens": new_tokens,
                "options": options, "n_kept": n_kept(n_visual, options), "n_text": _TEXT,
            }  # fmt: skip


def _job(given: argparse.Namespace, folder: Path, config: Any, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    longest = max(one["grid"][0] * one["grid"][1] for one in cases) + _TEXT + given.new_tokens
    engine: dict[str, Any] = {
        "model": str(folder), "dtype": dtype(), "load_format": "dummy", "max_model_len": max(8192, longest), "seed": 0,
        "limit_mm_per_prompt": {"image": 1, "video": 0}, "enable_prefix_caching": False, "mm_processor_cache_gb": 0,
        "disable_log_stats": False,
    }  # fmt: skip
    if torch.cuda.is_available():
        engine["gpu_memory_utilization"] = 0.7
    else:
        engine |= {"enforce_eager": True, "block_size": 32, "skip_mm_profiling": True}
    if cases[0]["options"] is not None:
        engine["hf_overrides"] = {"sparsevlm": {}}
    ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    return {
        "engine": engine | json.loads(given.engine), "image_ids": ids, "cases": cases, "calls": given.calls,
        "warmup": given.warmup,
    }  # fmt: skip


def _run(job: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    """Times of each case; one that was not reached has a note."""
    job_file, out, log = (place / name for name in ("job.json", "out.json", "log.txt"))
    out.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job), encoding="utf-8")
    with log.open("w", encoding="utf-8") as lines:
        command = [sys.executable, "-m", "benchmark.vllm_pruning_child", str(job_file), str(out)]
        code = subprocess.run(
            command, env=environment(), stdout=lines, stderr=subprocess.STDOUT, check=False
        ).returncode
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    if len(found) < len(job["cases"]):
        last = log.read_text(encoding="utf-8", errors="replace")
        print(last[-6000:], file=sys.stderr)
        note = f"not reached, exit code {code}"
        found += [{"times": {}, "note": note}] * (len(job["cases"]) - len(found))
    return found


def _rows(given: argparse.Namespace, case: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    shared = {
        "case": case["name"], **setting_columns(case["options"]), "requests": str(case["requests"]),
        "n_visual": str(case["grid"][0] * case["grid"][1]), "n_kept": str(case["n_kept"]),
        "n_text": str(case["n_text"]), "new_tokens": str(case["new_tokens"]), "note": found["note"],
    }  # fmt: skip
    if found["note"]:
        return [{**shared, "phase": "total", "metric": "ms"}]
    rows = []
    for phase, values in found["times"].items():
        rows.append({**shared, "phase": phase, "metric": "ms", **percentiles(values)})
        if phase == "total":
            tokens = [1e3 * case["requests"] * case["new_tokens"] / value for value in values]
            rows.append({**shared, "phase": phase, "metric": "new_tokens_per_s", **percentiles(tokens)})
            requests = [1e3 * case["requests"] / value for value in values]
            rows.append({**shared, "phase": phase, "metric": "requests_per_s", **percentiles(requests)})
    return rows


if __name__ == "__main__":
    main()
