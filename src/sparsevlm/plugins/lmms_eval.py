"""The entry point ``lmms_eval.models``: tells lmms-eval that a model ``sparsevlm`` exists, and loads nothing.

``python -m lmms_eval --model sparsevlm --model_args pretrained=PATH_OR_ID,keep=0.5 --tasks mme`` finds it by name. The
model itself, with torch and transformers, is imported when lmms-eval makes one.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "sparsevlm"
CLASS_PATH = "sparsevlm.plugins.lmms_model.SparseVLM"


def manifest() -> Any:
    """Return the ``ModelManifest`` of the chat model; called by lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path=CLASS_PATH)
