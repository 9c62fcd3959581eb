"""ToMe-style merging: similar tokens become their mean until the budget is met; nothing is dropped.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), arXiv 2210.09461, bipartite soft matching. The
paper merges r tokens in every block of a vision transformer; here the rounds follow each other on the visual
embeddings. Runs before the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.bipartite_merge import best_partners, merge_best_pairs, merged_rows
from ...kernels.clusters import spread_clusters
from ...kernels.places import indices_of
from ..context import BEFORE_DECODER, Selection, SelectionContext
from ..padded import PaddedContext, PaddedSelection
from ..scoring import top_k
from ..similarity import finite, padded_unit_rows, row_chunks, unit_rows


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
            score, partner = _proposals(unit_rows(sums)[None], alive.new_full((1,), n))
            merged = top_k(score[0], min(n // 2, n - n_keep))
            gone, into = 2 * merged, partner[0, merged]
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

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size, in as many rounds as the largest can take.

        A round at most halves the rows, so that a sample with merges left has no more than the rounds have room for.
        """
        valid, n_visual = context.valid, context.valid.shape[1]
        itself = torch.arange(n_visual, device=valid.device).expand_as(valid)
        n_left, row_of, is_kept = context.n_visual.clone(), torch.where(valid, itself, -1), valid.clone()
        rows, unit = context.hidden_states, padded_unit_rows(context.hidden_states, valid)
        while (n_rows := unit.shape[1]) > 1:
            score, partner = _proposals(unit, n_left)
            places = merge_best_pairs(score, partner, n_left, context.n_keep, row_of, is_kept, n_rows)
            rows, unit = merged_rows(rows, places, (n_rows + 1) // 2)
        kept = indices_of(is_kept, context.most_kept)
        target = kept.gather(1, row_of.clamp_min(0))
        is_kept, target, weight = spread_clusters(itself, valid, is_kept, target, n_visual, "mean")
        return PaddedSelection(is_kept, target, weight, is_kept & (weight < 1.0))


def _proposals(unit: torch.Tensor, n_left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Score and partner of every even row of several samples."""
    even, odd = unit[:, 0::2], unit[:, 1::2]
    chunks = row_chunks(even.shape[1], odd.shape[0] * odd.shape[1])
    found = [best_partners(_cosines(even[:, rows], odd), n_left) for rows in chunks]
    scores, partners = zip(*found, strict=True)
    return (scores[0], partners[0]) if len(found) == 1 else (torch.cat(scores, dim=1), torch.cat(partners, dim=1))


def _cosines(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    # On a CPU the order of a sum depends on its place in the matrix: in float32 equal rows would not tie.
    return (even.double() @ odd.double().mT).float() if even.device.type == "cpu" else even @ odd.mT
