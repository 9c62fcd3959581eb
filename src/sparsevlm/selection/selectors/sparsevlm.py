"""SparseVLM: keep what the raters look at, recycle the best of the rest; and its variants.

Source: Zhang et al., "SparseVLM" (ICML 2025), arXiv 2410.04417, significance of visual tokens and token recycling.
Runs at target layers. The variants differ in options only, see each class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...config import check_unit_interval
from ...kernels.rank_counts import count_clusters_of
from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..padded import PaddedContext, PaddedSelection, padded_sample, unpadded
from ..places import place_by_score
from ..recycle import clusters_within, count_clusters, recycle
from ..scoring import visual_scores


@dataclass(frozen=True)
class SparseVLMSelector:
    """Scores are the raters' attention sums; a part of the output is clusters of dropped tokens.

    Of ``n_keep`` tokens, C = :func:`~sparsevlm.selection.recycle.clusters_within` are recycled, unless the budget
    policy asks for a number of clusters (the rank-adaptive count, where τ and θ bind in full).

    Parameters
    ----------
    tau, theta : float, optional
        Recycled fraction of the dropped tokens, clusters per recycled token, in [0, 1]. ``None``: the options of the
        same names. A value given here overrides such an option, and raises if that has another than its default.
    """

    name = "sparsevlm"
    placement = TARGET_LAYERS
    needs = frozenset({"rater_attention"})
    default_schedule = "geometric"
    recycles = True
    settings: ClassVar[Mapping[str, Any]] = {}
    tau: float | None = None
    theta: float | None = None

    def __post_init__(self) -> None:
        for option in ("tau", "theta"):
            if getattr(self, option) is not None:
                check_unit_interval(option, getattr(self, option))

    @property
    def overrides(self) -> dict[str, Any]:
        """Options that the variant sets, and those given to this object."""
        own = {"tau": self.tau, "theta": self.theta}
        return {**self.settings, **{option: value for option, value in own.items() if value is not None}}

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Choose ``n_keep`` rows, some of them clusters of dropped ones."""
        assert context.rater_attention is not None  # declared in needs
        return unpadded(self.select_padded(padded_sample(context, n_keep)))

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.rater_attention is not None  # declared in needs
        config, n_keep, n_visual = context.config, context.n_keep, context.n_visual
        tau = config.tau if self.tau is None else self.tau
        theta = config.theta if self.theta is None else self.theta
        place = place_by_score(visual_scores(context.rater_attention), context.valid)
        recycles, n_clusters = config.recycle, context.n_clusters
        if not recycles:
            return PaddedSelection(place < n_keep[:, None])
        if n_clusters is None:
            n_clusters = clusters_within(n_visual, n_keep, context.most_kept, tau, theta)
        n_best = n_keep - n_clusters
        n_recycled = torch.maximum(count_clusters_of(n_visual - n_best, tau, theta)[0], n_clusters)
        # Bounds of these numbers that need no value.
        most = context.valid.shape[1]
        most_recycled, most_clusters = count_clusters(most, tau, theta)
        most_clusters = min(max(1, most_clusters), context.most_kept)
        is_best = place < n_best[:, None]
        is_member = ~is_best & (place < (n_best + n_recycled)[:, None])
        found = recycle(
            context.hidden_states, is_member, n_clusters, max(most_recycled, most_clusters), most_clusters, config.merge
        )
        itself = torch.arange(most, device=place.device)
        return PaddedSelection(
            is_best | found.is_centre,
            torch.where(is_best, itself, found.target),
            torch.where(is_best, 1.0, found.weight),
            found.is_centre,
        )


@dataclass(frozen=True)
class SparseVLMPaperSelector(SparseVLMSelector):
    """With the raters of the paper: chosen once, ``r_i ≥ mean(r)`` for the embeddings' relevance r."""

    name = "sparsevlm-paper"
    settings: ClassVar[Mapping[str, Any]] = {"raters": "embedding"}


@dataclass(frozen=True)
class SparseVLMv2Selector(SparseVLMSelector):
    """As in the second version of the authors' code (SparseVLM+): scores from the heads with the most attention to
    visual tokens, original positions, nothing recycled."""

    name = "sparsevlm-v2"
    settings: ClassVar[Mapping[str, Any]] = {"heads": "visual", "recycle": False}
