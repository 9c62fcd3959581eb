"""Rows of the vision tower for images that were not encoded ahead: those of several kinds, or given encoded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models import ModelAdapter
from ...request.step import VisionRows
from ..call import Call
from ..runner import ModelRunner
from .program import VisionOutput
from .tables import Grids


def encode_now(
    call: Call,
    adapter: ModelAdapter,
    runner: ModelRunner,
    may_encode: Callable[[], bool],
    cache_bytes: int,
    needs: frozenset[str],
) -> VisionOutput | None:
    """Encode the images and videos of a call.

    Parameters
    ----------
    call : Call
    adapter : ModelAdapter
    runner : ModelRunner
    may_encode : callable
        Tells whether the tower's program may take the place of its modules, if nothing is hooked to them.
    cache_bytes : int
    needs : frozenset of str
        What is read of the tower.

    Returns
    -------
    VisionOutput or None
        Images before videos; ``None``: something is to be read, and the tower's program does not run.
    """
    found: list[Tensor] = []
    read: list[VisionRows] = []
    n_cached: int | None = None
    for kind, grids in call.grids.items():
        output, modality = call.encoded(kind), adapter.modalities[kind]
        if output is None:
            pixels = call.visual[modality.pixels]
            seen = None if grids is None else _by_program(runner, may_encode, pixels, tuple(grids), cache_bytes, needs)
            if seen is not None:
                found.append(seen.tokens.clone())  # before the next kind is encoded
                if seen.rows is not None:
                    read.append(seen.rows.each(lambda rows, dim: rows.clone()))
                n_cached = seen.n_cached if seen.n_cached is None else seen.n_cached + (n_cached or 0)
                continue
            if needs:
                return None
            sizes = {name: call.arguments.get(name) for name in modality.size_inputs}
            output = getattr(adapter.base_model, f"get_{kind}_features")(pixels, **sizes)
        if needs:
            return None
        found += output.pooler_output
    return VisionOutput(torch.cat(found), n_cached=n_cached, rows=VisionRows.joined(read) if needs else None)


def _by_program(
    runner: ModelRunner,
    may_encode: Callable[[], bool],
    pixels: Tensor,
    grids: Grids,
    cache_bytes: int,
    needs: frozenset[str],
) -> VisionOutput | None:
    """Images by the tower's program, if it can run."""
    try:
        runner.look()
        if not may_encode() or runner.foreign_tower_hook():
            return None
        return runner.encode(pixels, grids, cache_bytes=cache_bytes, needs=needs)
    except torch.OutOfMemoryError:
        runner.release_memory()
        runner.look()
        return None
