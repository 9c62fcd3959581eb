"""What an engine is refused for before it is built, each with the reason and what to do."""

from __future__ import annotations

from typing import Any

from . import COVERED
from .compat import check_vllm
from .options import KEY, Options


def check_engine(vllm_config: Any) -> None:
    """Refuse an engine that asks for pruning where it cannot be had.

    Parameters
    ----------
    vllm_config : VllmConfig
        One without ``hf_overrides={"sparsevlm": {...}}``, or that vLLM has completed after a check, passes.

    Raises
    ------
    ImportError
        For a version of vLLM that was not tested.
    TypeError, ValueError
        For options that are wrong.
    NotImplementedError
        For models, and ways to run one, that the plugin does not cover.
    """
    model_config = vllm_config.model_config
    # vLLM builds the decoder from a copy of what has passed, with the options in it but under the decoder's own name.
    if model_config is None or getattr(model_config, "config_updated", False):
        return
    given = getattr(model_config.hf_config, KEY, None)
    if given is None:
        return
    check_vllm()
    Options.of_engine(given)
    if not set(model_config.architectures) & set(COVERED):
        raise NotImplementedError(
            f"hf_overrides={{'{KEY}': ...}} was given for {', '.join(model_config.architectures)}; under vLLM the "
            f"plugin covers {', '.join(COVERED)}. Run this model under transformers (apply_sparsevlm), or leave it out."
        )
    _check_ways_to_run(vllm_config)
    from .mm_config import tell_pruning

    tell_pruning(model_config)


def _check_ways_to_run(vllm_config: Any) -> None:
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise NotImplementedError(
            f"pipeline_parallel_size={stages}: positions of the kept tokens are known in the first stage alone, and "
            "vLLM does not hand them on. Use tensor_parallel_size or data_parallel_size."
        )
    mm_config = vllm_config.model_config.multimodal_config
    if rate := getattr(mm_config, "video_pruning_rate", None):
        raise NotImplementedError(
            f"video_pruning_rate={rate}: vLLM's own pruning of videos and the plugin would both decide how many tokens "
            f"a video has. Leave it out: keep in hf_overrides={{'{KEY}': ...}} holds for videos as well."
        )
    if KEY in (getattr(mm_config, "mm_processor_kwargs", None) or {}):
        raise ValueError(
            f"mm_processor_kwargs of the engine holds {KEY!r}, which is for requests: give the engine's options as "
            f"hf_overrides={{'{KEY}': ...}}."
        )
    if getattr(vllm_config, "speculative_config", None) is not None:
        raise NotImplementedError(
            "speculative decoding was not tested with the plugin: leave speculative_config out, or "
            f"hf_overrides={{'{KEY}': ...}}."
        )
    if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise NotImplementedError(
            "LoRA adapters of the vision tower count its tokens by the placeholders of a prompt, of which pruning "
            "leaves fewer: set enable_tower_connector_lora=False."
        )
