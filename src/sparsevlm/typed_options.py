"""Types of the options that are passed by name, for type checkers alone: nothing is imported from here at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from .selection.context import Selector


class MoreOptions(TypedDict, total=False):
    """Fields of :class:`~sparsevlm.SparseVLMConfig` that :func:`sparsevlm.apply_sparsevlm` does not name."""

    raters: Literal["attention", "embedding", "all"]
    heads: Literal["all", "visual"]
    recycle: bool
    merge: Literal["mean", "sum"]
    schedule: Literal["geometric", "single"] | Sequence[int] | Sequence[float] | None
    rank_lambda: float
    rank_tolerance: float | Literal["machine"]
    strict: bool
    seed: int
    preset: Literal["paper-192", "paper-128", "paper-64"] | None
    engine: bool | None
    vision_keep: float
    image_cache: int
    timeout: float | None
    min_keep_per_image: int
    weights: Literal["model", "fp8"] | None
    turns: Literal["first", "refresh", "agnostic"]


class AllOptions(MoreOptions, total=False):
    """All of them, as ``state.options`` takes them."""

    n_vis: int | None
    target_layers: Sequence[int] | None
    min_keep: int
    tau: float
    theta: float
    keep: int | float | Sequence[int | float] | None
    selector: str | Selector | None
