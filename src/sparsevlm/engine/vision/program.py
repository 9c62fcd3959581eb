"""The vision tower as a fixed list of operations per set of grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ...kernels.attention import equal_attention, varlen_attention
from ...kernels.elementwise import rms_norm, rotate, swiglu
from ...models import ModelAdapter
from ...models.base import PackedTower, TowerBlock
from ..cuda_graphs import CapturedPrograms, GraphPool
from ..fused_weights import FusedWeights
from ..text.layer import summed
from .patch_pruning import KeptPatches, choose

T = TypeVar("T")
Grids = tuple[tuple[int, int, int], ...]

# Graphs that are kept; each holds the activations of its grids.
_MOST_GRAPHS = 8


@dataclass(frozen=True)
class Sequences:
    """Patches that see each other, one sequence behind the other.

    Attributes
    ----------
    cu_seqlens : Tensor of shape (n + 1,), int32
        Where each begins.
    max_seqlen : int
    equal : bool
        Whether all are as long.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    equal: bool

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device) -> Sequences:
        """By their offsets on the host."""
        lengths = cu_seqlens.diff()
        max_seqlen = int(lengths.max())
        return cls(cu_seqlens.to(device), max_seqlen, bool((lengths == max_seqlen).all()))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of each within itself."""
        if self.equal:
            return equal_attention(query, key, value, self.max_seqlen, scaling, causal=False)
        return varlen_attention(query, key, value, self.cu_seqlens, self.max_seqlen, scaling, causal=False)

    def left(self, before: Tensor, per_token: int, length: int | None) -> Sequences:
        """Lengths of each image where only some tokens are kept.

        Parameters
        ----------
        before : Tensor of shape (n_tokens + 1,), int64
            How many are kept before each place.
        per_token : int
            Patches of a token.
        length : int or None
            Patches that are left of each, if these are as many.
        """
        cu_seqlens = (before[self.cu_seqlens.long() // per_token] * per_token).to(torch.int32)
        return Sequences(cu_seqlens, self.max_seqlen if length is None else length, length is not None)


@dataclass(frozen=True)
class Tables:
    """Tensors that depend on the grids alone.

    Attributes
    ----------
    order, back : Tensor of shape (n_tokens,), int64, or None
        From reading order to windows and back; ``None`` where the tower has no windows.
    cos, sin : Tensor of shape (n_patches, head_dim), float32
        In the order of windows.
    frames, windows : Sequences
        Of blocks with full attention, and of the others.
    """

    order: Tensor | None
    back: Tensor | None
    cos: Tensor
    sin: Tensor
    frames: Sequences
    windows: Sequences


def make_tables(tower: PackedTower, grids: Grids) -> Tables:
    """Tables of a set of grids (t, h, w), in visual tokens."""
    weight, side = tower.projection.weight, tower.side
    on_cpu = torch.tensor([(t, h * side, w * side) for t, h, w in grids], dtype=torch.int64)
    positions = get_vision_position_ids(on_cpu, side).to(weight.device)
    cos, sin = tower.rotary(weight.new_zeros(0, dtype=torch.float32), positions)
    sizes = torch.repeat_interleave(on_cpu[:, 1] * on_cpu[:, 2], on_cpu[:, 0])
    frames = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
    order = back = None
    windows = frames
    if tower.window is not None:
        index, starts = get_vision_window_index(on_cpu, side, tower.window * side, 1)
        order, windows = index.to(weight.device), torch.as_tensor(starts, dtype=torch.int32)
        back = torch.argsort(order)
        cos, sin = _reordered(tower, cos, order), _reordered(tower, sin, order)
    return Tables(order, back, cos, sin, Sequences.of(frames, weight.device), Sequences.of(windows, weight.device))


def encode_images(tower: PackedTower, weights: FusedWeights, tables: Tables, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images.

    Parameters
    ----------
    tower : PackedTower
    weights : FusedWeights
    tables : Tables
    patches : Tensor of shape (n_patches, channels · frames · side²)
        In the dtype of the tower, in reading order of their tokens.

    Returns
    -------
    hidden : Tensor of shape (n_patches, hidden_size)
        Of the last block, in the order in which the tower works.
    tokens : Tensor of shape (n_tokens, text hidden_size)
        Merged, in reading order.
    """
    if tables.order is not None:
        patches = _reordered(tower, patches, tables.order)
    hidden = linear(patches, tower.projection.weight.flatten(1))  # kernel and stride are the same
    residual: Tensor | None = None
    for block in tower.blocks:
        sequences = tables.frames if block.is_full else tables.windows
        normed, hidden = _normed(block.attention_norm, hidden, residual)
        query, key, value = block.qkv(normed).unflatten(-1, (3, block.n_heads, -1)).unbind(1)
        query, key = rotate(query, key, tables.cos, tables.sin)
        mixed = sequences.attend(query, key, value, block.scaling)
        normed, hidden = _normed(block.mlp_norm, block.output(mixed.flatten(1)), hidden)
        residual = _mlp(block, weights, normed)
    hidden = summed(hidden, residual)
    tokens = tower.merger(hidden)
    return hidden, tokens if tables.back is None else tokens[tables.back]


def left_tables(
    tower: PackedTower, tables: Tables, grids: Grids, numbers: tuple[int, ...], kept: KeptPatches
) -> Tables:
    """Tables of the tokens that are kept; windows and frames stay what they are, with fewer patches in each."""
    per_token = tower.side**2
    alone = len(set(numbers)) == 1 and all(t == 1 for t, _, _ in grids)
    cos, sin = (_reordered(tower, table, kept.places) for table in (tables.cos, tables.sin))
    frames = tables.frames.left(kept.before, per_token, per_token * numbers[0] if alone else None)
    windows = frames if tower.window is None else tables.windows.left(kept.before, per_token, None)
    return Tables(kept.working, kept.back, cos, sin, frames, windows)


def _normed(norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(norm, nn.LayerNorm):
        return rms_norm(hidden, norm.weight, norm.variance_epsilon, residual)
    total = hidden if residual is None else residual + hidden
    return norm(total), total


def _mlp(block: TowerBlock, weights: FusedWeights, hidden: Tensor) -> Tensor:
    if block.gate is None:
        out: Tensor = block.mlp(hidden)
        return out
    fused, down = weights.of(block.mlp), weights.of(block.down)
    if fused is None or down is None:
        out = block.down(swiglu(block.gate(hidden), block.up(hidden)))
        return out
    return down(swiglu(*fused(hidden)))[0]


def _reordered(tower: PackedTower, patches: Tensor, order: Tensor) -> Tensor:
    return patches.unflatten(0, (-1, tower.side**2))[order].flatten(0, 1)


@dataclass(frozen=True)
class VisionOutput:
    """Encoded images; the next call of the program overwrites them.

    Attributes
    ----------
    hidden, tokens : Tensor
        As :func:`encode_images` gives them.
    kept : Tensor of shape (n_tokens,), int64, or None
        Which visual tokens these are, in reading order, if not all; on the host, once ``ready`` is over.
    ready : torch.cuda.Event or None
    stays : bool
        Whether the tensors are the program's, in place from call to call.
    """

    hidden: Tensor
    tokens: Tensor
    kept: Tensor | None = None
    ready: torch.cuda.Event | None = None
    stays: bool = True


class VisionGraph:
    """The program of one set of grids, with its own patches.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool or None
        ``None``: it is run once, and not recorded.
    grids : tuple of (t, h, w)
        In visual tokens.
    numbers : tuple of int or None
        Visual tokens of each image that are computed; ``None``: all.
    like : Tensor
        Patches, for shape and device.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        weights: FusedWeights,
        pool: GraphPool | None,
        grids: Grids,
        numbers: tuple[int, ...] | None,
        like: Tensor,
    ) -> None:
        tower = adapter.vision.program
        assert tower is not None  # else refused
        tables, per_token = make_tables(tower, grids), tower.side**2
        patches = torch.zeros_like(like, dtype=tower.projection.weight.dtype)
        self._patches = patches
        self._is_recorded = pool is not None

        def record(run: Callable[[], T]) -> Callable[[], T]:
            return run if pool is None else pool.record(run)

        self._choose: Callable[[], Tensor] | None = None
        if numbers is not None:
            kept = KeptPatches.empty(sum(numbers), like.shape[0] // per_token, like.device)

            def choose_again() -> Tensor:
                tokens = patches.unflatten(0, (-1, per_token)).flatten(1)
                kept.become(choose(tokens, grids, numbers, tables.order))
                return kept.tokens

            self._choose = record(choose_again)
            self._run = record(
                lambda: encode_images(tower, weights, left_tables(tower, tables, grids, numbers, kept), patches)
            )
        else:
            self._run = record(lambda: encode_images(tower, weights, tables, patches))

    def __call__(self, patches: Tensor) -> VisionOutput:
        self._patches.copy_(patches)
        if self._choose is None:
            return VisionOutput(*self._run(), stays=self._is_recorded)
        kept = self._choose()
        if not kept.is_cuda:
            return VisionOutput(*self._run(), kept, stays=self._is_recorded)
        on_host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        on_host.copy_(kept, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return VisionOutput(*self._run(), on_host, ready, self._is_recorded)


class VisionGraphs(CapturedPrograms[tuple[Grids, tuple[int, ...] | None], VisionGraph]):
    """The vision programs of a model, by grids and by how much of them is computed.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool) -> None:
        super().__init__(_MOST_GRAPHS, pool)
        self._adapter, self._weights = adapter, weights

    def __call__(self, patches: Tensor, grids: Grids, numbers: tuple[int, ...] | None = None) -> VisionOutput:
        """Encode images, or so many tokens of each."""

        def make(pool: GraphPool | None) -> VisionGraph:
            return VisionGraph(self._adapter, self._weights, pool, grids, numbers, patches)

        return self.get_or_capture((grids, numbers), make)(patches)
