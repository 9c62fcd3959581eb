"""Provenance of a run: versions, commit, device, weights, data."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

from ... import __version__
from ..suites.fingerprint import fingerprint
from .resolved_model import ResolvedModel

_ROOT = Path(__file__).parents[4]


def versions(model: ResolvedModel, data: str) -> dict[str, str]:
    """Returns everything beside the configuration that figures depend on.

    Parameters
    ----------
    model : ResolvedModel
    data : str
        Fingerprint of the suite.
    """
    on_gpu = model.device.startswith("cuda")
    checkpoint = [file for suffix in ("json", "jinja", "safetensors") for file in model.folder.glob(f"*.{suffix}")]
    return {
        "sparsevlm": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(model.device) if on_gpu else f"CPU {platform.machine()}",
        "dtype": model.dtype,
        "weights": fingerprint(checkpoint),
        "data": data,
    }


def commit() -> str:
    """Returns the commit of the checkout that this code runs from, marked ``-dirty`` if files differ from it.

    Without git ``SPARSEVLM_COMMIT`` names it; without either it is ``"unknown"``.
    """
    if given := os.environ.get("SPARSEVLM_COMMIT"):
        return given
    if not (_ROOT / ".git").exists():
        return "unknown"

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
