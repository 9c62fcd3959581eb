"""CDPruner: diversity of the kept tokens, conditioned on the instruction.

Source: Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs"
(NeurIPS 2025), arXiv 2506.10967, conditional similarity and greedy MAP of the conditional DPP. The paper takes the
relevance from CLIP's text tower; without one it is taken against the language model's own embeddings of the text.
Runs before the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.places import first_picks
from ..context import BEFORE_DECODER, SelectionContext
from ..greedy import dpp_map, dpp_order, dpp_order_by_gram
from ..padded import PaddedContext, PaddedSelection
from ..similarity import min_max, padded_min_max, padded_unit_rows, unit_rows


@dataclass(frozen=True)
class CDPrunerSelector:
    """Greedy MAP of the DPP with kernel ``L = diag(r) · cos(x_i, x_j) · diag(r)``.

    The relevance r is ``mean_m cos(x_i, t_m)`` over the text tokens t_m, scaled to [0, 1] by its range.
    """

    name = "cdpruner"
    placement = BEFORE_DECODER
    needs = frozenset({"features", "text_features"})
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> Tensor:
        """Choose ``n_keep`` rows that are relevant and unlike each other."""
        return self.select_batch([context], n_keep)[0]

    def select_batch(self, contexts: Sequence[SelectionContext], n_keep: int) -> Sequence[Tensor]:
        """The same for several samples with as many tokens each, in as many steps as for one."""
        units, qualities = [], []
        for context in contexts:
            assert context.features is not None  # declared in needs
            assert context.text_features is not None
            unit, text = unit_rows(context.features), unit_rows(context.text_features)
            units.append(unit)
            qualities.append(min_max(unit @ text.sum(dim=0) / max(1, text.shape[0])))
        return dpp_map(torch.stack(units), torch.stack(qualities), n_keep).unbind()

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.text_features is not None  # declared in needs
        assert context.is_text is not None
        unit, valid = padded_unit_rows(context.hidden_states, context.valid), context.valid
        text = padded_unit_rows(context.text_features, context.is_text).sum(dim=1)
        likeness = (unit @ text[..., None])[..., 0] / context.is_text.sum(dim=1, keepdim=True).clamp_min(1)
        quality = padded_min_max(likeness, valid)
        if unit.is_cuda:
            order = dpp_order_by_gram(unit, quality, context.most_kept, counts=context.n_picks)
        else:
            order = dpp_order(unit, quality, context.most_kept)
        return PaddedSelection(first_picks(order, context.n_keep, valid))
