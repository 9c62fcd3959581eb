"""Models of vLLM that prune, with their processors; vLLM imports this when it builds one of them."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from .model import PruningModel
from .processor import PruningProcessor


class PrunedQwen2VLProcessor(PruningProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Of Qwen2-VL."""


class PrunedQwen2_5VLProcessor(PruningProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):  # noqa: N801
    """Of Qwen2.5-VL."""


class PrunedQwen3VLProcessor(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Of Qwen3-VL."""


def _registered(processor: type, module: Any, info: str, dummy: str) -> Any:
    return MULTIMODAL_REGISTRY.register_processor(
        processor, info=getattr(module, info), dummy_inputs=getattr(module, dummy)
    )


@_registered(PrunedQwen2VLProcessor, qwen2_vl, "Qwen2VLProcessingInfo", "Qwen2VLDummyInputsBuilder")
class PrunedQwen2VL(PruningModel, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL."""


@_registered(PrunedQwen2_5VLProcessor, qwen2_5_vl, "Qwen2_5_VLProcessingInfo", "Qwen2_5_VLDummyInputsBuilder")
class PrunedQwen2_5VL(PruningModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL."""


@_registered(PrunedQwen3VLProcessor, qwen3_vl, "Qwen3VLProcessingInfo", "Qwen3VLDummyInputsBuilder")
class PrunedQwen3VL(PruningModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""

    frames_apart = True
