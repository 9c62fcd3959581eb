"""CDPruner: diversity of the kept tokens, conditioned on the instruction.

Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
(NeurIPS 2025), arXiv 2506.10967, conditional similarity and greedy MAP of the conditional DPP. The paper takes the
relevance from CLIP's text tower; without one it is taken against the language model's own embeddings of the text.
Runs before the decoder.
"""

from __future__ import annotations

import torch

from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import dpp_map
from ..similarity import min_max, unit_rows


class CDPrunerSelector:
    """Greedy MAP of the DPP with kernel ``L = diag(r) · cos(x_i, x_j) · diag(r)``.

    The relevance r is ``mean_m cos(x_i, t_m)`` over the text tokens t_m, scaled to [0, 1] by its range.
    """

    name = "cdpruner"
    placement = BEFORE_DECODER
    needs = frozenset({"features", "text_features"})
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Choose ``n_keep`` rows that are relevant and unlike each other."""
        assert context.features is not None  # declared in needs
        assert context.text_features is not None
        unit, text = unit_rows(context.features), unit_rows(context.text_features)
        relevance = unit @ text.sum(dim=0) / max(1, text.shape[0])
        return dpp_map(unit, min_max(relevance), n_keep)
