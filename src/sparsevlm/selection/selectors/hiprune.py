"""HiPrune: objects from a middle block of the vision tower, their surroundings, and the global tokens of the last.

Source: Liu et al., "HiPrune" (ACL Findings 2026), arXiv 2508.00553, anchor, buffer and register tokens. Runs before
the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import check_unit_interval
from ..context import BEFORE_DECODER, SelectionContext
from ..scoring import top_k


@dataclass(frozen=True)
class HiPruneSelector:
    """Anchors: the ``α n_keep / 5`` tokens with the most attention in the middle block, at least one of five tokens.

    Buffers: the up to four neighbours of each anchor in its picture or frame. Registers: of the others, those with
    the most attention in the last block. At the border there are fewer buffers, and more registers in their place.

    Parameters
    ----------
    alpha : float
        Share of anchors and buffers, in [0, 1]; the authors' by default.
    """

    name = "hiprune"
    placement = BEFORE_DECODER
    needs = frozenset({"vision_attention"})
    default_schedule = "single"
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_unit_interval("alpha", self.alpha)

    def select(self, context: SelectionContext, n_keep: int) -> Tensor:
        """Choose ``n_keep`` rows, about a tenth of them anchors and buffers."""
        assert context.vision_attention is not None  # declared in needs
        middle, last = context.vision_attention.float()
        n_anchors = min(max(1, round(self.alpha * n_keep / 5)), n_keep // 5)
        anchors = top_k(middle, n_anchors)
        chosen = _with_neighbours(anchors, context.coordinates)
        return top_k(last + torch.where(chosen, torch.inf, 0.0), n_keep)


def _with_neighbours(anchors: Tensor, coordinates: Tensor) -> Tensor:
    """Mask of the anchors and of the tokens one step beside, above or below them in the same frame.

    Neighbours are found by height and width coordinates. Frames are told apart by the reading order, not by the time
    coordinate: two frames of a fast video can share it, and so can a long video and the picture after it.

    Parameters
    ----------
    anchors : Tensor of shape (n_anchors,), int64
    coordinates : Tensor of shape (3, n_visual), int64

    Returns
    -------
    Tensor of shape (n_visual,), bool
    """
    time, height, width = coordinates.diff(dim=1)
    goes_on = (time == 0) & (((height == 0) & (width == 1)) | ((height == 1) & (width <= 0)))
    frame = torch.nn.functional.pad((~goes_on).cumsum(dim=0), (1, 0))
    distance = (coordinates[1:, anchors, None] - coordinates[1:, None, :]).abs().sum(dim=0)
    return ((distance <= 1) & (frame[anchors, None] == frame)).any(dim=0)
