"""The plugin of vLLM: visual tokens are dropped before the decoder, to a budget that the sizes of images decide.

Its entry point in the group ``vllm.general_plugins`` is :func:`register`, which vLLM calls in each of its processes.
Nothing changes until an engine is started with ``hf_overrides={"sparsevlm": {...}}``.
"""

from __future__ import annotations

COVERED = {
    "Qwen2VLForConditionalGeneration": "PrunedQwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "PrunedQwen2_5VL",
    "Qwen3VLForConditionalGeneration": "PrunedQwen3VL",
}


def register() -> None:
    """Give vLLM the pruning classes of the models that are covered, and the check of an engine's configuration."""
    from .compat import hook_cpu_runner, hook_engine_config, is_tested

    hook_engine_config()
    if not is_tested():
        return  # the check refuses an engine that asks for pruning; others stay as they are
    from vllm import ModelRegistry

    hook_cpu_runner()
    for architecture, name in COVERED.items():
        ModelRegistry.register_model(architecture, f"{__name__}.families:{name}")
