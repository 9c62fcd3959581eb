"""Model families as data: where the decoder, the vision tower and the visual tokens of a model are."""

from .base import RECURRENT, SLIDING, Decoder, Family, LateFeatures, Modality, ModelAdapter, Vision
from .layout import Grid, Layout, Tiles, n_tokens, separators
from .registry import FAMILIES, adapter_for, register_adapter, supported_model_types
from .wrapping import check_module, compiled_parts, may_have_compiled, unwrap, wrapper_hint

__all__ = [
    "FAMILIES",
    "RECURRENT",
    "SLIDING",
    "Decoder",
    "Family",
    "Grid",
    "LateFeatures",
    "Layout",
    "Modality",
    "ModelAdapter",
    "Tiles",
    "Vision",
    "adapter_for",
    "check_module",
    "compiled_parts",
    "may_have_compiled",
    "n_tokens",
    "register_adapter",
    "separators",
    "supported_model_types",
    "unwrap",
    "wrapper_hint",
]
