"""Random selection: the baseline that every method has to beat. Runs at target layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..padded import PaddedContext, PaddedSelection, padded_sample, unpadded
from ..places import highest

_BITS = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomSelector:
    """A uniform draw without replacement; the same seed, row of the batch and layer give the same tokens.

    So a sample draws other tokens in another row: copies for beams or returned sequences differ from each other.
    """

    name = "random"
    placement = TARGET_LAYERS
    needs: ClassVar[frozenset[str]] = frozenset()
    default_schedule = "geometric"
    draws = True

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Draw ``n_keep`` rows."""
        return unpadded(self.select_padded(padded_sample(context, n_keep)))

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        rows = torch.arange(context.valid.shape[1], device=context.valid.device)
        return PaddedSelection(highest(-_mixed(rows, context.seeds[:, None]).double(), context.valid, context.n_keep))


def _mixed(rows: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Numbers of 32 bits as good as random, int64: a multiply-xorshift hash (Wellons, lowbias32) of each row, stirred
    by its seed."""
    mixed = (rows * 0x9E3779B9 + seeds) & _BITS
    for _ in range(2):  # once, and again with the seed stirred in
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _BITS
        mixed = ((mixed ^ (mixed >> 16)) + seeds) & _BITS
    return mixed
