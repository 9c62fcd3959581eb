"""Training-free visual token pruning for Hugging Face vision-language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import apply_sparsevlm, remove_sparsevlm, reset_n_vis
    from .config import SparseVLMConfig
    from .models import register_adapter
    from .report import Report
    from .report_total import ReportTotal
    from .selection.context import Selection, SelectionContext, Selector
    from .state import SparseVLMState

__version__ = "1.0.0rc1"

# Loaded on first use, so that the command line answers --help without torch.
_HOME = {
    "apply_sparsevlm": "api",
    "remove_sparsevlm": "api",
    "reset_n_vis": "api",
    "register_adapter": "models",
    "SparseVLMConfig": "config",
    "Report": "report",
    "ReportTotal": "report_total",
    "SparseVLMState": "state",
    "Selection": "selection.context",
    "SelectionContext": "selection.context",
    "Selector": "selection.context",
}

__all__ = [
    "Report",
    "ReportTotal",
    "Selection",
    "SelectionContext",
    "Selector",
    "SparseVLMConfig",
    "SparseVLMState",
    "apply_sparsevlm",
    "register_adapter",
    "remove_sparsevlm",
    "reset_n_vis",
]

if not TYPE_CHECKING:  # which would take every misspelt name for one of them

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
