"""SparseVLM: keep what the raters look at, recycle the best of the rest; and its variants.

Source: Zhang et al., "SparseVLM" (ICML 2025), arXiv 2410.04417, significance of visual tokens and token recycling.
Runs at target layers. The variants differ in options only, see each class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..recycle import clusters_within, count_clusters, recycle
from ..scoring import top_k, visual_scores


class SparseVLMSelector:
    """Scores are the raters' attention sums; a part of the output is clusters of dropped tokens.

    Of ``n_keep`` tokens, C = :func:`~sparsevlm.selection.recycle.clusters_within` are recycled, unless the budget
    policy asks for a number of clusters (the rank-adaptive count, where τ and θ bind in full).
    """

    name = "sparsevlm"
    placement = TARGET_LAYERS
    needs = frozenset({"rater_attention"})
    default_schedule = "geometric"
    recycles = True

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Choose ``n_keep`` rows, some of them clusters of dropped ones."""
        assert context.rater_attention is not None  # declared in needs
        config, n_visual = context.config, context.n_visual
        scores = visual_scores(context.rater_attention)
        n_clusters = context.n_clusters
        if n_clusters is None:
            n_clusters = clusters_within(n_visual, n_keep, config.tau, config.theta) if config.recycle else 0
        kept = top_k(scores, n_keep - n_clusters)
        if n_clusters == 0:
            return Selection(kept)
        dropped = torch.ones(n_visual, dtype=torch.bool, device=kept.device)
        dropped[kept] = False
        drop_idx = dropped.nonzero().squeeze(-1)
        n_recycled = max(count_clusters(drop_idx.shape[0], config.tau, config.theta)[0], n_clusters)
        centres, members, target, member_weight = recycle(
            context.hidden_states, scores, drop_idx, n_recycled, n_clusters, config.merge
        )
        merge_target = torch.full((n_visual,), -1, dtype=torch.long, device=kept.device)
        weight = torch.zeros(n_visual, dtype=torch.float32, device=kept.device)
        merge_target[kept], weight[kept] = kept, 1.0
        merge_target[members], weight[members] = target, member_weight
        return Selection(torch.cat([kept, centres]).sort().values, merge_target, weight, centres)


class SparseVLMPaperSelector(SparseVLMSelector):
    """With the raters of the paper: chosen once, ``r_i ≥ mean(r)`` for the embeddings' relevance r."""

    name = "sparsevlm-paper"
    overrides: ClassVar[dict[str, Any]] = {"raters": "embedding"}


class SparseVLMv2Selector(SparseVLMSelector):
    """As in the second version of the authors' code (SparseVLM+): scores from the heads with the most attention to
    visual tokens, original positions, nothing recycled."""

    name = "sparsevlm-v2"
    overrides: ClassVar[dict[str, Any]] = {"heads": "visual", "recycle": False}
