"""Segments of the decoder: the layers between two prune steps as one program over the first rows of the workspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.attention import equal_attention, varlen_attention
from ...kernels.elementwise import rotate_into
from ...models import ModelAdapter
from ..cuda_graphs import GraphPool, LRUCache
from ..fused_weights import FusedWeights
from .layer import Attend, run_layer, summed
from .workspace import PromptInputs, PromptShape, Workspace

# Programs that are kept; they share their memory, a graph itself is small.
_MOST_GRAPHS = 512


@dataclass(frozen=True)
class Segment:
    """Some layers, and the capacities that their program is made for.

    Attributes
    ----------
    first, stop : int
        Layers ``first`` to ``stop - 1``.
    rows, batch : int
    max_seqlen : int
        Rows of the longest sample; ``rows`` where there is one.
    prompt : PromptShape or None
        Where it begins with the embeddings of a prompt.
    is_read : bool
        Whether the input and the query of the last layer are kept, for a prune step that reads them.
    """

    first: int
    stop: int
    rows: int
    batch: int
    max_seqlen: int
    prompt: PromptShape | None = None
    is_read: bool = False


def run_segment(adapter: ModelAdapter, weights: FusedWeights, space: Workspace, segment: Segment) -> Tensor | None:
    """Run a segment; waits for nothing.

    Returns
    -------
    Tensor of shape (batch, vocab_size), or None
        Logits of every sample's last row, behind the last layer.
    """
    if segment.prompt is not None:
        _load(adapter, space, segment.prompt)
    rows = segment.rows
    cu_seqlens = space.cu_seqlens[: segment.batch + 2]
    cu_seqlens[-1].fill_(rows)
    space.layer_cu_seqlens[segment.first : segment.stop, : segment.batch + 2] = cu_seqlens
    hidden = space.hidden[:rows]
    residual: Tensor | None = None
    for layer_idx in range(segment.first, segment.stop):
        block, is_last = weights.blocks[layer_idx], layer_idx == segment.stop - 1
        if is_last and segment.is_read:
            hidden, residual = summed(hidden, residual), None
            space.previous[:rows] = hidden
        attend = _attention(space, segment, layer_idx, block.scaling, is_last and segment.is_read)
        hidden, residual = run_layer(block, weights, hidden, residual, attend)
    if segment.stop == len(weights.blocks):
        last = summed(hidden, residual)[cu_seqlens[1:-1].long().sub_(1).clamp_min_(0)]
        logits: Tensor = adapter.decoder.head(adapter.decoder.norm(last))
        return logits
    if segment.stop > segment.first:
        space.hidden[:rows] = summed(hidden, residual)
    return None


def _load(adapter: ModelAdapter, space: Workspace, shape: PromptShape) -> None:
    """Embed a prompt, its visual tokens in their places."""
    rows, given = shape.rows, PromptInputs.of(shape, space.n_axes, space.integers)
    embeds = adapter.decoder.embed(given.ids)
    features = space.features[given.feature_rows.clamp_min(0)]
    hidden = torch.where(given.feature_rows[:, None] >= 0, features, embeds)
    space.hidden[:rows] = hidden
    cos, sin = adapter.decoder.rotary(hidden[None], given.positions[:, None])
    space.cos[:rows], space.sin[:rows] = cos[0], sin[0]
    space.cu_seqlens[: shape.batch + 1] = given.cu_seqlens
    space.visual_rows[: shape.batch, : shape.n_visual] = given.visual_rows
    space.alive[: shape.batch, : shape.n_visual] = torch.arange(shape.n_visual, device=hidden.device)
    space.image_idx[: shape.batch, : shape.n_visual] = given.image_idx
    space.min_keep_per_image[: shape.batch] = given.min_keep_per_image
    space.n_visual[:, : shape.batch] = given.n_visual
    space.stage.zero_()


def _attention(space: Workspace, segment: Segment, layer_idx: int, scaling: float, keeps_query: bool) -> Attend:
    """Attention of a layer, which leaves keys and values in the workspace."""
    rows = segment.rows
    cos, sin = space.cos[:rows], space.sin[:rows]
    keys, values = space.keys[layer_idx][:rows], space.values[layer_idx][:rows]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = rotate_into(query, key, value, cos, sin, keys, values)
        if keeps_query:
            space.query[:rows] = query
        if segment.batch == 1:  # the sample does not see the padding behind it
            return equal_attention(query, keys, values, rows, scaling, causal=True)
        cu_seqlens = space.cu_seqlens[: segment.batch + 2]
        return varlen_attention(query, keys, values, cu_seqlens, segment.max_seqlen, scaling, causal=True)

    return attend


class Segments(LRUCache[Segment, Callable[[], Tensor | None]]):
    """Programs of segments over one workspace.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    space : Workspace
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool, space: Workspace) -> None:
        super().__init__(_MOST_GRAPHS)
        self._adapter, self._weights, self._pool, self._space = adapter, weights, pool, space

    def run(self, segment: Segment) -> Tensor | None:
        """Run a segment by its program, which is captured where there is none; the next run overwrites what it
        gives."""

        def run() -> Tensor | None:
            return run_segment(self._adapter, self._weights, self._space, segment)

        return self.get(segment, lambda: self._pool.record(run, self._space.snapshot(segment.rows)))()
