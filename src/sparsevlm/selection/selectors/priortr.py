"""PriorTR: after an early layer, keep what the question makes the model look at, beyond what it looks at anyway.

Source: Chen et al., "Accelerating Multimodal Large Language Models with Prior-Corrected Token Reduction" (ECCV 2026),
arXiv 2606.24156, V-information score. Runs at target layers: one cut after the first of them (the authors: after the
third). Their null token is the one right behind the image, here of the last image of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..context import TARGET_LAYERS, Selection, SelectionContext
from ..padded import PaddedContext, PaddedSelection, padded_sample, unpadded
from ..places import highest
from ..scoring import information_gain


@dataclass(frozen=True)
class PriorTRSelector:
    """Score ``s_i = p_i log(p_i / q_i)``; the highest stay.

    p is the attention of the prompt's last token, q that of the token right behind the images, mean over heads, each
    scaled to a sum of 1 over the visual tokens.
    """

    name = "priortr"
    placement = TARGET_LAYERS
    needs = frozenset({"last_attention", "prior_attention"})
    default_schedule = "single"

    def select(self, context: SelectionContext, n_keep: int) -> Selection:
        """Choose the ``n_keep`` rows with the highest score."""
        return unpadded(self.select_padded(padded_sample(context, n_keep)))

    def select_padded(self, context: PaddedContext) -> PaddedSelection:
        """The same for several samples filled up to one size."""
        return PaddedSelection(highest(gain_of(context), context.valid, context.n_keep))


def gain_of(context: PaddedContext) -> Tensor:
    """What the question adds to the attention of every token, (batch, n_visual), float32."""
    assert context.last_attention is not None  # both declared in needs
    assert context.prior_attention is not None
    return information_gain(context.last_attention, context.prior_attention, context.valid)
