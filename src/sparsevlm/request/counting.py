"""Visual tokens of a batch before any model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..models import ModelAdapter, separators
from .inputs import visual_grids


def visual_counts(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> list[int]:
    """Visual tokens of each sample, as a report counts them: placeholders but for separators that are never dropped.

    Parameters
    ----------
    adapter : ModelAdapter
    inputs : mapping
        Of ``generate``, with ``input_ids``.
    """
    ids = inputs["input_ids"].cpu()
    tokens = torch.tensor([modality.token_id for modality in adapter.modalities.values()], device="cpu")
    counts: list[int] = torch.isin(ids, tokens).sum(dim=1).tolist()
    if not adapter.family.protects_separators:
        return counts
    on_host = {**inputs, "input_ids": ids}
    layouts = {
        kind: adapter.family.layouts(adapter, kind, on_host)
        for kind, modality in adapter.modalities.items()
        if inputs.get(modality.pixels) is not None
    }
    rows = visual_grids(adapter, layouts, ids)
    apart = [sum(int(separators(layout).sum()) for layout in row) for row in rows] or [0] * len(counts)
    return [count - n for count, n in zip(counts, apart, strict=True)]
