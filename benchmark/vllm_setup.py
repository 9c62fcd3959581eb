"""What the benchmarks of vLLM share: models without weights, environment, settings of the plugin, columns of rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from sparsevlm.bench.rows import Row, cell, device_and_versions, spread
from sparsevlm.bench.shapes import empty_model
from sparsevlm.evaluation.execution.provenance import commit
from sparsevlm.plugins.vllm.budget import kept_per_run
from sparsevlm.plugins.vllm.compat import vllm_version
from sparsevlm.plugins.vllm.options import Options

DENSE, PRUNED = "vllm-dense", "vllm-sparsevlm"
SIDE = 28  # pixels along one side of a visual token
TINY = "tiny"
Setting = dict[str, Any] | None  # options of a request to the pruning engine; none of the dense one
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
_OF_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# Heads of a size that vLLM's kernels for CPUs take.
_TINY_TEXT = {"hidden_size": 128, "vocab_size": 151936}
_TINY_SECTIONS = [4, 6, 6]


def environment() -> dict[str, str]:
    """Environment of processes of vLLM; what is set already stays."""
    return {**_ENVIRONMENT, **({} if torch.cuda.is_available() else _OF_CPU), **os.environ}


def model_config(shape: str) -> Any:
    """Configuration of a model of a published shape, or of a tiny one that vLLM's kernels take."""
    with torch.device("meta"):
        config = empty_model(shape, torch.float32, "sdpa").config
    if shape != TINY:
        return config
    given = config.to_dict()
    given["text_config"] |= {**_TINY_TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
    given["text_config"]["rope_parameters"] |= {"mrope_section": _TINY_SECTIONS}
    given["vision_config"] |= {"hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 128}
    return transformers.Qwen2_5_VLConfig(**given)


def dtype() -> str:
    """Of models on this device."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def pruning_settings(keep: str, selectors: str) -> list[Setting]:
    """Options of requests to the pruning engine, all tokens first: what its way alone costs.

    Parameters
    ----------
    keep, selectors : str
        Fractions and names, with commas between them.
    """
    settings: list[Setting] = [{"keep": 1.0, "selector": "grid"}]
    for fraction in keep.split(","):
        settings += [{"keep": float(fraction), "selector": name} for name in selectors.split(",")]
    return settings


def n_kept(n_visual: int, setting: Setting) -> int:
    """Visual tokens that go on of an image, or a video of Qwen2.5-VL."""
    return n_visual if setting is None else sum(kept_per_run([n_visual], Options().of_request(setting)))


def setting_columns(setting: Setting) -> Row:
    """Columns that name a setting."""
    if setting is None:
        return {"provider": DENSE, "selector": "", "keep": "1.0"}
    return {"provider": PRUNED, "selector": setting["selector"], "keep": str(setting["keep"])}


def origin_columns(model: str, command: str) -> Row:
    """Columns that tell where rows come from."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = {"model": model, "dtype": dtype(), "vllm": vllm_version(), "commit": commit(), "command": command}
    return {**shared, **device_and_versions(device)}


def percentiles(values: Sequence[float]) -> Row:
    """Percentiles, and of how many values."""
    return {**spread(values), "p99": cell(float(np.percentile(values, 99))), "n": str(len(values))}
