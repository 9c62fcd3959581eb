"""VisionZip: the tokens that gather the vision tower's attention, and a few that stand for the rest.

Source: Yang et al., "VisionZip" (CVPR 2025), arXiv 2412.04467, dominant token selection and contextual token merging.
For a tower without CLS token the score is the attention that a token receives from all. Runs before the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...config import check_whole
from ...kernels.places import indices_of
from ..context import BEFORE_DECODER, Selection, SelectionContext
from ..padded import PaddedContext, PaddedSelection
from ..places import highest
from ..scoring import top_k
from ..similarity import nearest_rows, padded_nearest, padded_unit_rows, unit_rows


@dataclass(frozen=True)
class VisionZipSelector:
    """Dominant tokens have the largest column means of the last block's attention.

    Of the others, in order, every ``⌊n_rest / n_contextual⌋``-th is a contextual target; the rest is merged into the
    target with the most similar key, ``h'_t = mean of h over t and what joins it``. A mean over all members keeps the
    scale of an embedding; the authors' code adds the target to the mean of the others.

    Parameters
    ----------
    contextual, of : int
        So many of so many kept tokens are contextual. The published 54 + 10, 108 + 20 and 162 + 30 are one ratio.
    """

    name = "visionzip"
    placement = BEFORE_DECODER
    needs = frozenset({"vision_attention", "vision_keys"})
    default_schedule = "single"
    contextual: int = 10
    of: int = 64

    def __post_init__(self) -> None:
        check_whole("of", self.of, 1)
        check_whole("contextual", self.contextual, 0, self.of - 1)

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Choose ``n_keep`` rows, about 10 of 64 of them contextual."""
        assert context.vision_attention is not None  # declared in needs
        assert context.vision_keys is not None
        n_visual, n_contextual = context.n_visual, n_keep * self.contextual // self.of
        dominant = top_k(context.vision_attention[1].float(), n_keep - n_contextual)
        unit = unit_rows(context.vision_keys)
        if n_contextual == 0:
            return Selection(dominant)
        is_rest = torch.ones(n_visual, dtype=torch.bool, device=dominant.device)
        is_rest[dominant] = False
        rest = is_rest.nonzero().squeeze(-1)
        targets = rest[:: rest.shape[0] // n_contextual][:n_contextual]
        merge_target = torch.arange(n_visual, device=dominant.device)
        merge_target[rest] = targets[nearest_rows(unit[rest], unit[targets])[1]]
        merge_target[targets] = targets
        weight = 1.0 / torch.bincount(merge_target, minlength=n_visual)[merge_target].float()
        return Selection(torch.cat([dominant, targets]).sort().values, merge_target, weight, targets)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.vision_attention is not None  # declared in needs
        assert context.vision_keys is not None
        valid, n_contextual = context.valid, context.n_keep * self.contextual // self.of
        dominant = highest(context.vision_attention[:, 1].float(), valid, context.n_keep - n_contextual)
        most = context.most_kept * self.contextual // self.of
        if most == 0:
            return PaddedSelection(dominant)
        rest = valid & ~dominant
        step = (rest.sum(dim=1) // n_contextual.clamp_min(1)).clamp_min(1)[:, None]
        place = rest.cumsum(dim=1) - 1
        is_target = rest & (place % step == 0) & (place // step < n_contextual[:, None])
        targets, unit = indices_of(is_target, most), padded_unit_rows(context.vision_keys, valid)
        counts = torch.arange(most, device=targets.device) < n_contextual[:, None]
        own = unit.gather(1, targets[..., None].expand(-1, -1, unit.shape[-1]))
        nearest = targets.gather(1, padded_nearest(unit, own, counts)[1])
        joins = rest & ~is_target & (n_contextual > 0)[:, None]
        itself = torch.arange(valid.shape[1], device=targets.device).expand_as(nearest)
        merge_target = torch.where(joins, nearest, torch.where(dominant | is_target, itself, -1))
        sizes = torch.zeros_like(unit[..., 0]).scatter_add_(1, merge_target.clamp_min(0), (merge_target >= 0).float())
        weight = 1.0 / sizes.gather(1, merge_target.clamp_min(0)).clamp_min(1.0)
        return PaddedSelection(dominant | is_target, merge_target, weight, is_target)
