"""Model families as data: where the decoder, the vision tower and the visual tokens of a model are."""

from .base import RECURRENT, SLIDING, Decoder, Family, Grid, LateFeatures, Modality, ModelAdapter, Vision
from .registry import FAMILIES, adapter_for, supported_model_types
from .wrapping import check_module, compiled_parts, unwrap, wrapper_hint

__all__ = [
    "FAMILIES",
    "RECURRENT",
    "SLIDING",
    "Decoder",
    "Family",
    "Grid",
    "LateFeatures",
    "Modality",
    "ModelAdapter",
    "Vision",
    "adapter_for",
    "check_module",
    "compiled_parts",
    "supported_model_types",
    "unwrap",
    "wrapper_hint",
]
