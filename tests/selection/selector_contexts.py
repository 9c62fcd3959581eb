"""Selection contexts that hold everything a selector can need."""

from __future__ import annotations

import torch

from sparsevlm.config import SparseVLMConfig
from sparsevlm.selection.context import SelectionContext
from sparsevlm.selection.decide import checked_selection
from sparsevlm.selection.selectors import SELECTORS


def grid_coordinates(*grids, fast=False):
    """M-RoPE coordinates of pictures (height, width) or videos (frames, height, width), two text tokens between them.

    ``fast``: the frames of a video share their time coordinate.
    """
    parts, base = [], 1
    for grid in grids:
        frames, height, width = grid if len(grid) == 3 else (1, *grid)
        t, h, w = torch.meshgrid(*(torch.arange(size) for size in (frames, height, width)), indexing="ij")
        parts.append(torch.stack([0 * t if fast else t, h, w]).flatten(1) + base)
        base += max(height, width) + 2
    return torch.cat(parts, dim=1)


def make_context(n, seed=0, dim=8, n_text=3, kind="random", dtype=torch.float32, **fields):
    """A context of random values; ``kind`` makes rows alike ("identical", "pairs") or "zeros"."""
    generator = torch.Generator().manual_seed(seed)
    row = {"random": torch.arange(n), "pairs": torch.arange(n) // 2}.get(kind, torch.zeros(n, dtype=torch.long))
    scale = 0.0 if kind == "zeros" else 1.0

    def scores(*shape):
        return torch.rand(*shape, generator=generator)[..., row] * scale

    def states(size):
        return ((torch.rand(n, size, generator=generator) * 2 - 1)[row] * scale).to(dtype)

    given = {
        "layer": 2,
        "sample": 0,
        "config": SparseVLMConfig(min_keep=1),
        "hidden_states": states(dim),
        "coordinates": grid_coordinates((1, n)),
        "indices": torch.arange(n),
        "features": states(dim),
        "text_features": (torch.rand(n_text, dim, generator=generator) * 2 - 1).to(dtype),
        "rater_attention": scores(n_text, n),
        "previous_hidden_states": states(dim),
        "last_attention": scores(n),
        "prior_attention": scores(n),
        "vision_attention": scores(2, n),
        "vision_keys": states(dim),
    }
    return SelectionContext(**{**given, **fields})


def run(name, context, n_keep):
    """The checked selection of a registered selector."""
    result = SELECTORS[name]().select(context, n_keep)
    return checked_selection(result, context.hidden_states, n_keep, name)
