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
from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..recycle import clusters_within, count_clusters, recycle
from ..scoring import top_k, visual_scores


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
        config, n_visual = context.config, context.n_visual
        tau = config.tau if self.tau is None else self.tau
        theta = config.theta if self.theta is None else self.theta
        scores = visual_scores(context.rater_attention)
        n_clusters = context.n_clusters
        if n_clusters is None:
            n_clusters = clusters_within(n_visual, n_keep, tau, theta) if config.recycle else 0
        kept = top_k(scores, n_keep - n_clusters)
        if n_clusters == 0:
            return Selection(kept)
        dropped = torch.ones(n_visual, dtype=torch.bool, device=kept.device)
        dropped[kept] = False
        drop_idx = dropped.nonzero().squeeze(-1)
        n_recycled = max(count_clusters(drop_idx.shape[0], tau, theta)[0], n_clusters)
        centres, members, target, member_weight = recycle(
            context.hidden_states, scores, drop_idx, n_recycled, n_clusters, config.merge
        )
        merge_target = torch.full((n_visual,), -1, dtype=torch.long, device=kept.device)
        weight = torch.zeros(n_visual, dtype=torch.float32, device=kept.device)
        merge_target[kept], weight[kept] = kept, 1.0
        merge_target[members], weight[members] = target, member_weight
        return Selection(torch.cat([kept, centres]).sort().values, merge_target, weight, centres)


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
