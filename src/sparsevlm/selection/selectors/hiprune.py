"""HiPrune: objects from a middle block of the vision tower, their surroundings, and the global tokens of the last.

Source: Liu et al., "HiPrune" (ACL Findings 2026), arXiv 2508.00553, anchor, buffer and register tokens. Runs before
the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import check_unit_interval
from ...kernels.places import indices_of
from ..context import BEFORE_DECODER, SelectionContext
from ..padded import PaddedContext, PaddedSelection
from ..places import highest
from ..scoring import top_k
from ..similarity import row_chunks


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
        anchors = top_k(middle, self._most_anchors(n_keep))
        chosen = _with_neighbours(anchors, context.coordinates)
        return top_k(last + torch.where(chosen, torch.inf, 0.0), n_keep)

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        assert context.vision_attention is not None  # declared in needs
        assert context.coordinates is not None
        (middle, last), n_keep = context.vision_attention.float().unbind(dim=1), context.n_keep
        # Halves go to the even number, as Python rounds them.
        n_anchors = (self.alpha * n_keep.double() / 5).round().long().clamp_min(1).minimum(n_keep // 5)
        anchors = indices_of(highest(middle, context.valid, n_anchors), self._most_anchors(context.most_kept))
        counts = torch.arange(anchors.shape[1], device=anchors.device) < n_anchors[:, None]
        chosen = _near(anchors, counts, context.coordinates)
        score = last + torch.where(chosen, torch.inf, 0.0)
        return PaddedSelection(highest(score, context.valid, n_keep))

    def _most_anchors(self, n_keep: int) -> int:
        return min(max(1, round(self.alpha * n_keep / 5)), n_keep // 5)


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
    return _near(anchors[None], torch.ones_like(anchors[None], dtype=torch.bool), coordinates[None])[0]


def _near(anchors: Tensor, counts: Tensor, coordinates: Tensor) -> Tensor:
    """:func:`_with_neighbours` of several samples, of whose anchors only some count.

    Parameters
    ----------
    anchors : Tensor of shape (batch, n_anchors), int64
    counts : Tensor of shape (batch, n_anchors), bool
    coordinates : Tensor of shape (batch, 3, n_visual), int64

    Returns
    -------
    Tensor of shape (batch, n_visual), bool
    """
    time, height, width = coordinates.diff(dim=2).unbind(dim=1)
    goes_on = (time == 0) & (((height == 0) & (width == 1)) | ((height == 1) & (width <= 0)))
    frame = torch.nn.functional.pad((~goes_on).cumsum(dim=1), (1, 0))
    near = torch.zeros_like(frame, dtype=torch.bool)
    places = torch.cat([coordinates[:, 1:], frame[:, None]], dim=1)
    for some in row_chunks(anchors.shape[1], near.numel()):
        own = places.gather(2, anchors[:, None, some].expand(-1, 3, -1))
        height, width, other = (own[..., None] - places[:, :, None]).abs().unbind(dim=1)
        near |= ((height + width <= 1) & (other == 0) & counts[:, some, None]).any(dim=1)
    return near
