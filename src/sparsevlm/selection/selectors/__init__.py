"""Built-in selectors, one file each; a new one is a file and a line in this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...config import SparseVLMConfig
from ..context import Selector
from .grid import GridSelector
from .random import RandomSelector
from .sparsevlm import SparseVLMSelector

SELECTORS: dict[str, Callable[[], Any]] = {
    "sparsevlm": SparseVLMSelector,
    "random": RandomSelector,
    "grid": GridSelector,
}


def make_selector(config: SparseVLMConfig) -> Selector:
    """Return the selector that ``config.selector`` names, or the object itself.

    Raises
    ------
    ValueError
        If there is no selector of that name; the message lists those that exist.
    """
    if not isinstance(config.selector, str):
        return config.selector
    if config.selector not in SELECTORS:
        raise ValueError(f"there is no selector {config.selector!r}; there are {', '.join(sorted(SELECTORS))}.")
    return SELECTORS[config.selector]()
