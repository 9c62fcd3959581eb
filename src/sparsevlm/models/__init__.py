"""Model families as data: where the decoder, the vision tower and the visual tokens of a model are."""

from .base import Family, Modality, ModelAdapter, special_token_ids
from .decoder import RECURRENT, SLIDING, Decoder, LateFeatures
from .examples import BlankImage, blank_word
from .layout import Grid, Layout, Tiles, View, as_grid, n_tokens, separators, views
from .registry import FAMILIES, adapter_for, register_adapter, supported_model_types
from .tower import Vision
from .wrapping import check_module, compiled_parts, may_have_compiled, unwrap, wrapper_hint

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
    "View",
    "Vision",
    "adapter_for",
    "as_grid",
    "blank_word",
    "check_module",
    "compiled_parts",
    "may_have_compiled",
    "n_tokens",
    "register_adapter",
    "separators",
    "special_token_ids",
    "supported_model_types",
    "unwrap",
    "views",
    "wrapper_hint",
]
