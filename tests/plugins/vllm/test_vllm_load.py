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


@pytest.fixture
def measured(tmp_path, environment):
    """``measured(*options)``: rows by provider, kept fraction, clients, phase and metric."""

    def run(*options: str) -> dict[tuple[str, ...], dict[str, str]]:
        file = tmp_path / "rows.csv"
        command = [sys.executable, "-m", "benchmark.bench_vllm_load", *options, "--append-to", str(file)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=880
        )
        assert done.returncode == 0, done.stderr[-4000:]
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        assert not any(row["note"] for row in rows), done.stderr[-4000:]
        return {(row["provider"], row["keep"], row["clients"], row["phase"], row["metric"]): row for row in rows}

    return run


def test_pruned_prompts_are_shorter(measured):
    found = measured(*OPTIONS)
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


def test_pruned_videos_are_shorter(measured):
    few = ("--frames", "4", "--visual", "64", "--clients", "1", "--seconds", "3", "--choice-seconds", "0")
    found = measured(*OPTIONS, *few)
    dense, pruned = (found[(*of, "1", "prompt", "tokens")] for of in (("vllm-dense", "1.0"), ("vllm-sparsevlm", "0.5")))
    assert float(pruned["p50"]) == float(dense["p50"]) - 64
