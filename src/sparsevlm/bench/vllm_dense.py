"""vLLM on the same shapes, dense, in a process of its own before anything else takes memory of the device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import AnyCase, Case, MixedCase, PictureCase
from .mixed import MixedMeasurement
from .providers import Setting
from .rounds import MIN_TIMED, Measurement, Settings

VLLM_DENSE = Setting("vllm-dense", 1.0, None)
# In one process, and asking nobody on a network.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_ROUND = 1024  # longest prompts are rounded up to this


def vllm_is_installed() -> bool:
    """Tells whether there is a vLLM to be measured."""
    return importlib.util.find_spec("vllm") is not None


def measure_vllm(
    folder: Path, config: Any, cases: Sequence[AnyCase], settings: Settings, *, dtype: str, is_random: bool
) -> dict[str, Measurement]:
    """Measures cases, by their names with as many visual tokens as one image has; those that fail have a note.

    Parameters
    ----------
    folder : Path
        Of a checkpoint, see :func:`~.checkpoint.write_checkpoint_files` for one without weights.
    config : PretrainedConfig
        Its configuration.
    cases : sequence of Case, PictureCase or MixedCase
    settings : Settings
    dtype : str
    is_random : bool
        Whether weights are drawn at random.
    """
    cases = [case.of_one_image if isinstance(case, Case) else case for case in cases]
    job = {
        "model": str(folder), "dtype": dtype, "random": is_random, "seed": settings.seed,
        "image_ids": [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id],
        "longest": -(-max(map(_longest, cases)) // _ROUND) * _ROUND, "cases": [_job(case, settings) for case in cases],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        job_file, out, log = (Path(place) / name for name in ("job.json", "out.json", "log.txt"))
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", f"{__package__}.vllm_child", str(job_file), str(out)]
        with log.open("w", encoding="utf-8") as lines:
            code = subprocess.run(
                command, env={**os.environ, **_ENVIRONMENT}, stdout=lines, stderr=subprocess.STDOUT, check=False
            ).returncode
        if not out.exists():
            last = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            note = f"failed with exit code {code}: {' '.join(last[-1:])[:200]}"
            return {case.name: _measurement(case, [], note, "") for case in cases}
        found = json.loads(out.read_text(encoding="utf-8"))
    remark = f"vllm {found['version']}, {found['remark']}"
    return {
        case.name: _measurement(case, found["cases"][case.name]["times"], found["cases"][case.name]["note"], remark)
        for case in cases
    }


def _longest(case: AnyCase) -> int:
    if isinstance(case, MixedCase):
        return case.visual[1] + case.text[1] + case.new_tokens
    request = case.request if isinstance(case, PictureCase) else case
    return request.n_visual + request.n_text + case.new_tokens


def _job(case: AnyCase, settings: Settings) -> dict[str, Any]:
    job: dict[str, Any] = {"name": case.name, "new_tokens": case.new_tokens, "least": MIN_TIMED}
    job |= {"from_picture": isinstance(case, PictureCase), "seconds": settings.seconds, "most": settings.iterations}
    if isinstance(case, MixedCase):
        warmup = case.warmup_requests(settings.seed)
        job |= {"calls": [[_request(one)] for one in case.requests(settings.seed)]}
        return job | {"warmup": [[_request(one)] for one in warmup]}
    call = [_request(case.request if isinstance(case, PictureCase) else case)] * case.batch
    return job | {"calls": [call], "warmup": [call] * settings.warmup}


def _request(case: Case) -> list[int]:
    return [*case.grid, case.n_text]


def _measurement(case: AnyCase, times: list[dict[str, float]], note: str, remark: str) -> Measurement:
    if not isinstance(case, MixedCase):
        apart = "" if isinstance(case, PictureCase) else ", preprocessing not counted"
        return Measurement(times, path="vllm", note=note, remark=remark + apart)
    remark = f"{remark}, preprocessing not counted"
    return MixedMeasurement(path="vllm", note=note, remark=remark, by_request=dict(enumerate(times)))
