"""Rows of the vision tower for images that were not encoded ahead: those of several kinds, or given encoded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models import ModelAdapter
from ..call import Call
from ..runner import ModelRunner
from .tables import Grids


def encode_now(call: Call, adapter: ModelAdapter, runner: ModelRunner, may_encode: Callable[[], bool]) -> Tensor:
    """Encode the images and videos of a call.

    Parameters
    ----------
    call : Call
    adapter : ModelAdapter
    runner : ModelRunner
    may_encode : callable
        Tells whether the tower's program may take the place of its modules, if nothing is hooked to them.

    Returns
    -------
    Tensor of shape (n_features, hidden_size)
        Images before videos.
    """
    found: list[Tensor] = []
    for kind, grids in call.grids.items():
        output, modality = call.encoded(kind), adapter.modalities[kind]
        if output is None:
            pixels = call.visual[modality.pixels]
            if grids is not None and (tokens := _by_program(runner, may_encode, pixels, tuple(grids))) is not None:
                found.append(tokens)
                continue
            sizes = {name: call.arguments.get(name) for name in modality.size_inputs}
            output = getattr(adapter.base_model, f"get_{kind}_features")(pixels, **sizes)
        found += output.pooler_output
    return torch.cat(found)


def _by_program(runner: ModelRunner, may_encode: Callable[[], bool], pixels: Tensor, grids: Grids) -> Tensor | None:
    """Images by the tower's program, if it can run."""
    try:
        runner.look()
        if not may_encode() or runner.foreign_tower_hook():
            return None
        return runner.vision(pixels, grids).tokens.clone()
    except torch.OutOfMemoryError:
        runner.release_memory()
        runner.look()
        return None
