"""Segments of the decoder: the layers between two prune steps as one program over the first rows of the workspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...kernels.attention import equal_attention, varlen_attention
from ...kernels.elementwise import rotate_into
from ...models import ModelAdapter
from ...models.decoder import BlockModules
from ..cuda_graphs import GraphPool, LRUCache
from ..fused_weights import FusedWeights
from .layer import Attend, head_norms, run_layer, summed
from .workspace import Workspace

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
    is_read : bool
        Whether the input, queries and keys of the last layer are kept where a prune step reads them, whatever layer it
        is.
    """

    first: int
    stop: int
    rows: int
    batch: int
    max_seqlen: int
    is_read: bool = False


def run_segment(adapter: ModelAdapter, weights: FusedWeights, space: Workspace, segment: Segment) -> Tensor | None:
    """Run a segment; waits for nothing.

    Returns
    -------
    Tensor of shape (batch, vocab_size), or None
        Logits of every sample's last row, behind the last layer.
    """
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
        attend = _attention(space, segment, layer_idx, block, is_last and segment.is_read)
        hidden, residual = run_layer(block, weights, hidden, residual, attend)
        if layer_idx < len(space.late):
            hidden, residual = summed(hidden, residual) + space.late[layer_idx][:rows], None
    if segment.stop == len(weights.blocks):
        last = summed(hidden, residual)[cu_seqlens[1:-1].long().sub_(1).clamp_min_(0)]
        logits: Tensor = adapter.decoder.head(adapter.decoder.norm(last))
        return logits
    if segment.stop > segment.first:
        space.hidden[:rows] = summed(hidden, residual)
    return None


def _attention(space: Workspace, segment: Segment, layer_idx: int, block: BlockModules, is_read: bool) -> Attend:
    """Attention of a layer, which leaves keys and values in the workspace."""
    rows = segment.rows
    cos, sin = space.cos[:rows], space.sin[:rows]
    keys, values = space.keys[layer_idx][:rows], space.values[layer_idx][:rows]
    norms, scaling = head_norms(block), block.scaling

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = rotate_into(query, key, value, cos, sin, keys, values, norms=norms)
        if is_read:
            space.query[:rows], space.read_keys[:rows] = query, keys
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
