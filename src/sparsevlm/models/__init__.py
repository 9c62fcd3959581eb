"""Model families as data: where the decoder, the vision tower and the visual tokens of a model are."""

from .base import RECURRENT, SLIDING, Decoder, Family, LateFeatures, Modality, ModelAdapter, Vision
from .examples import BlankImage, blank_word
from .layout import Grid, Layout, Tiles, n_tokens, separators
from .registry import FAMILIES, adapter_for, register_adapter, supported_model_types
from .wrapping import check_module, compiled_parts, unwrap, wrapper_hint

__all__ = [
    "FAMILIES",
    "RECURRENT",
    "SLIDING",
    "BlankImage",
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
    "blank_word",
    "check_module",
    "compiled_parts",
    "n_tokens",
    "register_adapter",
    "separators",
    "supported_model_types",
    "unwrap",
    "wrapper_hint",
]
