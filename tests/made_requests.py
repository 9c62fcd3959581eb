"""Requests of the runtime made by hand."""

from __future__ import annotations

import torch

from sparsevlm.config import SparseVLMConfig
from sparsevlm.request.request import Request
from sparsevlm.request.sample import Sample
from sparsevlm.selection.budget import Plan
from sparsevlm.selection.context import SelectorTraits


class First:
    """Keeps the first rows."""

    def select(self, context, n_keep):
        return torch.arange(n_keep)


def make_sample(visual, other, *, alive=None, counts=None, tail=1) -> Sample:
    """Positions are given; all text behind the last visual token may vote."""
    visual, other = torch.tensor(visual, dtype=torch.long), torch.tensor(other, dtype=torch.long)
    return Sample(
        visual=visual,
        other=other,
        text=other,
        rater_candidates=other[other > (visual[-1] if len(visual) else -1)],
        last=other[-1:],
        alive=torch.arange(len(visual)) if alive is None else torch.tensor(alive),
        tail=tail,
        plan=None if counts is None else Plan(tuple(counts)),
    )


def make_request(*samples, target_layers=(1, 3), q_len=12, past_len=0, selector=None, **options) -> Request:
    selector = selector or First()
    traits = SelectorTraits.of(selector)
    config = SparseVLMConfig(**{"min_keep": 2, **options})
    request = Request(config, selector, traits, target_layers, q_len, past_len, len(samples))
    request.samples = list(samples)
    return request
