"""The configuration of a model's inputs by which vLLM is told that the model prunes."""

from __future__ import annotations

from typing import Any

from vllm.config.multimodal import MultiModalConfig


class PruningMultiModalConfig(MultiModalConfig):
    """The same with pruning on.

    vLLM itself reads that off the rate of its own pruning of videos, which decides how many tokens a video has as well.
    """

    def is_multimodal_pruning_enabled(self) -> bool:
        """Yes."""
        return True


def tell_pruning(model_config: Any) -> None:
    """Make the configuration of a model say that it prunes: to runners, and for the size of rotary tables."""
    model_config.multimodal_config.__class__ = PruningMultiModalConfig


def prunes(model_config: Any) -> bool:
    """Tells whether :func:`tell_pruning` was called."""
    return isinstance(model_config.multimodal_config, PruningMultiModalConfig)
