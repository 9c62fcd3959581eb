"""Built-in selectors, one file each; a new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...config import SparseVLMConfig, did_you_mean
from ..context import Selector
from .cdpruner import CDPrunerSelector
from .divprune import DivPruneSelector
from .fastv import FastVSelector
from .grid import GridSelector
from .hiprune import HiPruneSelector
from .mmtok import MMTokSelector
from .priortr import PriorTRSelector
from .pyramiddrop import PyramidDropSelector
from .random import RandomSelector
from .scope import ScopeSelector
from .span import SpanJointSelector, SpanSelector
from .span_features import SpanFeaturesSelector
from .span_prior import SpanPriorSelector
from .sparsevlm import SparseVLMPaperSelector, SparseVLMSelector, SparseVLMv2Selector
from .tome import ToMeSelector
from .v2drop import V2DropSelector
from .visionzip import VisionZipSelector

# Chosen by measurements (docs/accuracy.md); the second where target layers are named, or what is to leave them.
DEFAULT, DEFAULT_AT_LAYERS = "span-features", "span"
SELECTORS: dict[str, Callable[[], Any]] = {
    "span": SpanSelector,
    "span-features": SpanFeaturesSelector,
    "span-joint": SpanJointSelector,
    "span-prior": SpanPriorSelector,
    "sparsevlm": SparseVLMSelector,
    "sparsevlm-paper": SparseVLMPaperSelector,
    "sparsevlm-v2": SparseVLMv2Selector,
    "fastv": FastVSelector,
    "priortr": PriorTRSelector,
    "pyramiddrop": PyramidDropSelector,
    "v2drop": V2DropSelector,
    "visionzip": VisionZipSelector,
    "hiprune": HiPruneSelector,
    "divprune": DivPruneSelector,
    "cdpruner": CDPrunerSelector,
    "scope": ScopeSelector,
    "mmtok": MMTokSelector,
    "tome": ToMeSelector,
    "random": RandomSelector,
    "grid": GridSelector,
}


def default_of(config: SparseVLMConfig) -> str:
    """Name of the selector of options that name none: :data:`DEFAULT`, or :data:`DEFAULT_AT_LAYERS`.

    The latter where target layers are named, or a schedule, which without a budget does nothing.
    """
    is_scheduled = config.schedule is not None and config.has_budget
    return DEFAULT_AT_LAYERS if is_scheduled or config.target_layers is not None else DEFAULT


def make_selector(config: SparseVLMConfig) -> Selector:
    """Return the selector that ``config.selector`` names (``None``: :func:`default_of`), or the object itself.

    Raises
    ------
    ValueError
        If there is no selector of that name; the message lists those that exist.
    """
    name = default_of(config) if config.selector is None else config.selector
    if not isinstance(name, str):
        return name
    if name not in SELECTORS:
        named = f"{name!r}{did_you_mean(name, SELECTORS)}"
        raise ValueError(f"there is no selector {named}; there are {', '.join(sorted(SELECTORS))}.")
    return SELECTORS[name]()
