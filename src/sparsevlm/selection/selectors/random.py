"""Random selection: the baseline that every method has to beat. Runs at target layers."""

from __future__ import annotations

import torch

from ..context import TARGET_LAYERS, SelectionContext


class RandomSelector:
    """A uniform draw without replacement; the same seed, sample and layer give the same tokens."""

    name = "random"
    placement = TARGET_LAYERS
    needs: frozenset[str] = frozenset()
    default_schedule = "geometric"
    draws = True

    def select(self, context: SelectionContext, n_keep: int) -> torch.Tensor:
        """Draw ``n_keep`` rows."""
        generator = torch.Generator().manual_seed(
            context.config.seed * 1_000_003 + context.sample * 1009 + context.layer + 1
        )
        order = torch.randperm(context.n_visual, generator=generator)
        return order[:n_keep].sort().values.to(context.hidden_states.device)
