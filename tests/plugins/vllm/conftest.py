"""Engines of vLLM and their references, each made once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
sys.path[:0] = [str(HERE)]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",  # helpers of workers would be compiled one by one
}  # fmt: skip
ENGINE = {
    "dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "seed": 0, "block_size": 32,
    "limit_mm_per_prompt": {"image": 3, "video": 2}, "mm_processor_cache_gb": 0.1, "skip_mm_profiling": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment of processes of vLLM, in which torchvision can be imported."""
    shim = tmp_path_factory.mktemp("shim")
    (shim / "sitecustomize.py").write_text((TESTS / "torchvision_shim.py").read_text(encoding="utf-8"))
    paths = [str(shim), str(HERE), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """``reference(kind)``: checkpoint and transformers path of a family, made once."""
    from checkpoints import write_checkpoint
    from reference import Reference

    made: dict[str, tuple[Path, Reference]] = {}

    def of(kind: str) -> tuple[Path, Reference]:
        if kind not in made:
            folder = write_checkpoint(kind, tmp_path_factory.mktemp(kind))
            made[kind] = folder, Reference(folder)
        return made[kind]

    return of


@pytest.fixture
def ask(tmp_path, environment, reference):
    """``ask(kind, batches, **engine)``: what vLLM answers to batches of prompts, each asked together; ``dummies``: it
    makes the inputs that it measures its memory with as well."""

    def run(kind: str, batches: Sequence[Sequence[Any]], dummies: bool = False, **engine: Any) -> list[list[Any]]:
        folder, transformers_path = reference(kind)
        job: Mapping[str, Any] = {
            "dummies": dummies,
            "engine": {**ENGINE, "model": str(folder), **engine},
            "batches": [
                [(transformers_path.text_for_vllm(one), dataclasses.asdict(one)) for one in batch] for batch in batches
            ],
        }
        job_file, out, log = (tmp_path / name for name in ("job.json", "out.json", "log.txt"))
        job_file.write_text(json.dumps(job), encoding="utf-8")
        with log.open("w") as lines:
            command = [sys.executable, str(HERE / "engine_child.py"), str(job_file), str(out)]
            subprocess.run(command, env=environment, stdout=lines, stderr=subprocess.STDOUT, check=False, timeout=900)
        assert out.exists(), log.read_text(errors="replace")[-4000:]
        return json.loads(out.read_text(encoding="utf-8"))

    return run
