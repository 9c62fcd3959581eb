"""Random selection: the baseline that every method has to beat. Runs at target layers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..context import TARGET_LAYERS, SelectionContext


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

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Draw ``n_keep`` rows."""
        seed = int(context.config.seed) * 1_000_003 + context.sample * 1009 + context.layer + 1
        if seed >= 2**32:  # torch's generator looks at 32 bits only
            seed = random.Random(seed).getrandbits(32)
        generator = torch.Generator("cpu").manual_seed(seed)
        order = torch.randperm(context.n_visual, generator=generator, device="cpu")
        return order[:n_keep].sort().values.to(context.hidden_states.device)
