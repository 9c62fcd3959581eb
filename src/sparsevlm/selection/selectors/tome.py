"""ToMe-style merging: similar tokens become their mean until the budget is met; nothing is dropped.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), arXiv 2210.09461, bipartite soft matching. The
paper merges r tokens in every block of a vision transformer; here the rounds follow each other on the visual
embeddings. Runs before the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..context import BEFORE_DECODER, Selection, SelectionContext
from ..scoring import top_k
from ..similarity import finite, nearest_rows, unit_rows


@dataclass(frozen=True)
class ToMeSelector:
    """Rounds of bipartite matching: every even token proposes its most similar odd one, the best r pairs merge.

    ``r = min(⌊n / 2⌋, n − n_keep)`` of the n tokens that are left, in reading order; the odd token stays and becomes
    the size-weighted mean ``(s_a x_a + s_b x_b) / (s_a + s_b)``, which is the mean of all its members.
    """

    name = "tome"
    placement = BEFORE_DECODER
    needs = frozenset({"features"})
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Merge the rows into ``n_keep`` of them."""
        assert context.features is not None  # declared in needs
        n_visual = context.n_visual
        sums = finite(context.features)  # of a token's members: of the same direction as their mean
        alive = torch.arange(n_visual, device=sums.device)
        merge_target = alive.clone()
        while (n := alive.shape[0]) > n_keep:
            unit = unit_rows(sums)
            cosine, nearest = nearest_rows(unit[0::2], unit[1::2])
            merged = top_k(cosine, min(n // 2, n - n_keep))
            gone, into = 2 * merged, nearest[merged]
            # float64: the order in which a device adds must not show in a float32 sum
            joined = sums[1::2].double().index_add_(0, into, sums[gone].double()).float()
            joins = torch.arange(n_visual, device=sums.device)
            joins[alive[gone]] = alive[1::2][into]
            merge_target = joins[merge_target]
            stays = torch.ones(n, dtype=torch.bool, device=sums.device)
            stays[gone] = False
            sums = sums.index_copy(0, torch.arange(1, n, 2, device=sums.device), joined)[stays]
            alive = alive[stays]
        size = torch.bincount(merge_target, minlength=n_visual)
        return Selection(alive, merge_target, 1.0 / size[merge_target].float(), alive[size[alive] > 1])
