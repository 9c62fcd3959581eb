"""The benchmark of load, by a tiny model: it runs, and its rows show that prompts are shorter."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.config")  # tests/plugins/vllm by itself would do for "vllm"

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[3]
OPTIONS = (
    *("--shape", "tiny", "--visual", "100", "--selectors", "mmtok", "--keep", "0.5", "--clients", "1,3"),
    *("--new-tokens", "4", "--seconds", "5", "--warmup", "2", "--choice-seconds", "3", "--minutes", "14"),
)


def test_pruned_prompts_are_shorter(tmp_path, environment):
    file = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "benchmark.bench_vllm_load", *OPTIONS, "--append-to", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=880)
    assert run.returncode == 0, run.stderr[-4000:]
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert not any(row["note"] for row in rows), run.stderr[-4000:]
    found = {(row["provider"], row["keep"], row["clients"], row["phase"], row["metric"]): row for row in rows}
    for clients in ("1", "3"):
        dense = float(found["vllm-dense", "1.0", clients, "prompt", "tokens"]["p50"])
        assert float(found["vllm-sparsevlm", "1.0", clients, "prompt", "tokens"]["p50"]) == dense
        assert float(found["vllm-sparsevlm", "0.5", clients, "prompt", "tokens"]["p50"]) == dense - 50
        chosen = found["vllm-sparsevlm", "0.5", clients, "choice_per_request", "ms"]
        assert float(chosen["p50"]) > 0
        assert 0 < float(found["vllm-sparsevlm", "0.5", clients, "choice", "share_of_time"]["p50"]) < 1
        for setting in (("vllm-dense", "1.0"), ("vllm-sparsevlm", "0.5")):
            answered = found[(*setting, clients, "load", "requests_per_s")]
            assert int(answered["n"]) > 0
            tokens = found[(*setting, clients, "load", "new_tokens_per_s")]
            assert float(tokens["p50"]) == pytest.approx(4 * float(answered["p50"]), rel=1e-4)
            first, total = (found[(*setting, clients, phase, "ms")] for phase in ("first_token", "total"))
            assert 0 < float(first["p50"]) <= float(first["p99"])
            assert float(first["p50"]) < float(total["p50"])
