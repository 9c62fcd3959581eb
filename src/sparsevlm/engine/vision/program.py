"""The vision tower as programs over the patches of a call: what its grids say arrives as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...kernels.attention import padded_attention, varlen_attention
from ...kernels.elementwise import rms_norm, rotate, swiglu
from ...kernels.received_attention import received_attention
from ...models import ModelAdapter
from ...models.tower import PackedTower, TowerBlock
from ...request.step import VisionRows
from ..cuda_graphs import GraphPool, LRUCache
from ..fused_weights import FusedWeights
from ..text.layer import in_parts, summed
from .patch_pruning import ChoiceInputs, choose, n_choice_integers
from .position_table import interpolated
from .tables import Grids, VisionInputs, VisionShape, host_integers, n_integers

# Programs that are kept; they share their memory, a graph itself is small.
_MOST_GRAPHS = 256
_LEAST_PATCHES = 4096
# Capacities, whether only some tokens are computed, and what is read.
_Key = tuple[VisionShape, bool, frozenset[str]]
# Visual tokens, what follows them, and what was read.
_Encoded = tuple[Tensor, tuple[Tensor, ...], VisionRows]


class VisionReadings:
    """Reads what selectors need of the tower while it runs; waits for nothing.

    Parameters
    ----------
    adapter : ModelAdapter
    needs : frozenset of str
        Out of ``vision_attention`` and ``vision_keys``.
    given : VisionInputs
    """

    def __init__(self, adapter: ModelAdapter, needs: frozenset[str], given: VisionInputs) -> None:
        self._per_token, self._back = adapter.vision.patches_per_token, given.back
        self._blocks = [index for index, _ in adapter.vision.read_blocks] if needs else []
        self._needs, self._received = needs, dict[int, Tensor]()
        self._keys: Tensor | None = None
        frames = given.frames
        if frames.shape[0] == 1:  # a single one, which begins with the first patch
            frames = torch.cat([frames, given.n_patches])
        self._frames = frames.to(torch.int32)

    def read(self, index: int, block: TowerBlock, query: Tensor, key: Tensor) -> None:
        """Read a block, given its rotated queries and keys, (patches, heads, head_dim)."""
        if index in self._blocks and "vision_attention" in self._needs:
            self._received[index] = self._of_tokens(received_attention(query, key, self._frames, block.scaling))
        if index in self._blocks[1:] and "vision_keys" in self._needs:
            self._keys = self._of_tokens(key.float().mean(dim=1))

    def _of_tokens(self, of_patches: Tensor) -> Tensor:
        """Mean over what forms a visual token, in reading order."""
        return of_patches.unflatten(0, (-1, self._per_token)).mean(dim=1)[self._back]

    def rows(self) -> VisionRows:
        """What was read, padding behind."""
        attention = torch.stack([self._received[i] for i in self._blocks]) if self._received else None
        return VisionRows(attention, self._keys)


def encode_images(
    tower: PackedTower,
    weights: FusedWeights,
    shape: VisionShape,
    given: VisionInputs,
    patches: Tensor,
    readings: VisionReadings,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Encode images; waits for nothing.

    Parameters
    ----------
    tower : PackedTower
    weights : FusedWeights
    shape : VisionShape
    given : VisionInputs
    patches : Tensor of shape (n_patches, channels · frames · side²)
        In the dtype of the tower, in reading order of their tokens.
    readings : VisionReadings

    Returns
    -------
    tokens : Tensor of shape (n_tokens, text hidden_size)
        Merged, in reading order, padding behind.
    late : tuple of Tensor of shape (n_tokens, text hidden_size)
        What the decoder adds to the output of its first layers, likewise.
    """
    patches = patches.unflatten(0, (-1, tower.side**2))[given.order].flatten(0, 1)
    hidden = linear(
        patches, tower.projection.weight.flatten(1), tower.projection.bias
    )  # kernel and stride are the same
    if tower.position_table is not None:
        hidden = hidden + interpolated(tower.position_table, given.positions, given.sizes).to(hidden.dtype)
    cos, sin = tower.rotary(hidden.new_zeros(0, dtype=torch.float32), given.positions)
    frames, windows = given.frames.to(torch.int32), given.windows.to(torch.int32)

    def attend(block: TowerBlock, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        starts, longest = (frames, shape.longest_frame) if block.is_full else (windows, shape.longest_window)
        if starts.shape[0] == 1:
            return padded_attention(query, key, value, given.n_patches, block.scaling)
        return varlen_attention(query, key, value, starts, longest, block.scaling, causal=False)

    def mix(index: int, block: TowerBlock, normed: Tensor) -> Tensor:
        query, key, value = block.qkv(normed).unflatten(-1, (3, block.n_heads, -1)).unbind(1)
        query, key = rotate(query, key, cos, sin)
        readings.read(index, block, query, key)
        mixed: Tensor = block.output(attend(block, query, key, value).flatten(1))
        return mixed

    residual: Tensor | None = None
    mergers, late = dict(tower.late_mergers), list[Tensor]()
    for index, block in enumerate(tower.blocks):
        normed, hidden = _normed(block.attention_norm, hidden, residual)
        normed, hidden = _normed(block.mlp_norm, mix(index, block, normed), hidden)
        residual = _mlp(block, weights, normed)
        if index in mergers:
            hidden, residual = summed(hidden, residual), None
            late.append(mergers[index](hidden)[given.back])
    tokens: Tensor = tower.merger(summed(hidden, residual))
    return tokens[given.back], tuple(late)


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
    return in_parts(lambda rows: down(swiglu(*fused(rows)))[0], hidden, sum(fused.sizes))


@dataclass(frozen=True)
class VisionOutput:
    """Encoded images; the next call of the programs overwrites them.

    Attributes
    ----------
    tokens : Tensor of shape (n_tokens, text hidden_size)
        In reading order.
    kept : Tensor of shape (n_tokens,), int64, or None
        Which visual tokens these are, in reading order, if not all; on the host, once ``ready`` is over.
    ready : torch.cuda.Event or None
    n_cached : int or None
        Images that were encoded before; ``None``: nobody looked for them.
    rows : VisionRows or None
        What was read of the tower, by token.
    late : tuple of Tensor of shape (n_tokens, text hidden_size)
        What the decoder adds to the output of its first layers, by layer.
    apart : str or None
        Why the tower's own modules ran one by one, where they could have been recorded.
    """

    tokens: Tensor
    kept: Tensor | None = None
    ready: torch.cuda.Event | None = None
    n_cached: int | None = None
    rows: VisionRows | None = None
    late: tuple[Tensor, ...] = ()
    apart: str | None = None


class VisionSpace:
    """Room for the images of one call.

    Parameters
    ----------
    tower : PackedTower
    patches, integers : int
        Most of them.
    size, width : int
        Values of a patch, and of a visual token.

    Attributes
    ----------
    patches : Tensor of shape (patches, size)
    integers, chosen : Tensor, int64
        What the grids bring, and what becomes of it where only some tokens are computed, see :class:`VisionInputs`.
    choice : Tensor, int64
        See :class:`~.patch_pruning.ChoiceInputs`.
    encoded : Tensor of shape (1 + n_late, n_tokens, width)
        Visual tokens, and what the decoder adds behind its first layers, if anything: shared by all programs, each of
        which would hold as much by itself.
    """

    def __init__(self, tower: PackedTower, patches: int, integers: int, size: int, width: int) -> None:
        weight, n_late = tower.projection.weight, len(tower.late_mergers)
        self.encoded = weight.new_zeros((1 + n_late, patches // tower.side**2 if n_late else 0, width))
        self.patches = weight.new_zeros((patches, size))
        self.integers, self.chosen, self.choice = (
            torch.zeros(integers, dtype=torch.int64, device=weight.device) for _ in range(3)
        )


class VisionPrograms:
    """Programs of the tower of a model.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    pool : GraphPool
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, pool: GraphPool) -> None:
        self._adapter, self._weights, self._pool = adapter, weights, pool
        self._space: VisionSpace | None = None
        self._encoders: LRUCache[_Key, Callable[[], _Encoded]] = LRUCache(_MOST_GRAPHS)
        self._choosers: LRUCache[tuple[VisionShape, VisionShape, int], Callable[[], Tensor]] = LRUCache(_MOST_GRAPHS)

    def clear(self) -> None:
        """Free everything."""
        self._space = None
        self._encoders.clear()
        self._choosers.clear()

    def __len__(self) -> int:
        return len(self._encoders)

    @property
    def _tower(self) -> PackedTower:
        tower = self._adapter.vision.program
        assert tower is not None  # else refused
        return tower

    def _room(self, patches: int, integers: int, size: int) -> VisionSpace:
        space = self._space
        if space is None or patches > space.patches.shape[0] or integers > space.integers.shape[0]:
            before = (0, 0) if space is None else (space.patches.shape[0], space.integers.shape[0])
            self.clear()
            patches = max(_LEAST_PATCHES, before[0], patches)
            self._space = space = VisionSpace(
                self._tower,
                patches,
                max(8 * patches, before[1], 2 * integers),
                size,
                self._adapter.decoder.embed.weight.shape[1],
            )
        return space

    def __call__(
        self,
        patches: Tensor,
        grids: Grids,
        numbers: tuple[int, ...] | None = None,
        needs: frozenset[str] = frozenset(),
    ) -> VisionOutput:
        """Encode images, or some of their visual tokens.

        Parameters
        ----------
        patches : Tensor of shape (n_patches, channels · frames · side²)
        grids : tuple of (t, h, w)
            In visual tokens.
        numbers : tuple of int, optional
            Visual tokens of each image that are computed; ``None``: all.
        needs : frozenset of str
            What is read of the tower, where all are computed: out of ``vision_attention`` and ``vision_keys``.
        """
        tower = self._tower
        per_token = tower.side**2
        shape, integers = host_integers(tower.side, tower.window, tower.position_table is not None, grids)
        needed = integers.shape[0]
        if numbers is not None:
            number = sum(numbers)
            of_kept = shape.only(number * per_token)
            needed = max(n_integers(of_kept, per_token), n_choice_integers(shape.patches // per_token, len(grids)))
        space = self._room(shape.patches, needed, patches.shape[1])
        on_host = integers.pin_memory() if patches.is_cuda else integers
        space.integers[: on_host.shape[0]].copy_(on_host, non_blocking=True)
        space.patches[: patches.shape[0]].copy_(patches)
        if numbers is None:
            n_tokens = sum(t * h * w for t, h, w in grids)
            tokens, late, rows = self._encode(space, shape, False, needs)
            read = rows.each(lambda tensor, dim: tensor.narrow(dim, 0, n_tokens)) if needs else None
            return VisionOutput(tokens[:n_tokens], rows=read, late=tuple(one[:n_tokens] for one in late))
        kept = self._choose(space, shape, of_kept, grids, numbers)[:number]
        if not kept.is_cuda:
            tokens, late, _ = self._encode(space, of_kept, True)
            return VisionOutput(tokens[:number], kept, late=tuple(one[:number] for one in late))
        kept_on_host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=True)
        kept_on_host.copy_(kept, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        tokens, late, _ = self._encode(space, of_kept, True)
        return VisionOutput(tokens[:number], kept_on_host, ready, late=tuple(one[:number] for one in late))

    def _encode(
        self, space: VisionSpace, shape: VisionShape, is_chosen: bool, needs: frozenset[str] = frozenset()
    ) -> _Encoded:
        """Run the tower on what is in the workspace."""
        tower = self._tower

        def record() -> Callable[[], _Encoded]:
            given = VisionInputs.of(shape, tower.side**2, space.chosen if is_chosen else space.integers)
            patches = space.patches if is_chosen else space.patches[: shape.patches]

            def run() -> _Encoded:
                readings = VisionReadings(self._adapter, needs, given)
                tokens, late = encode_images(tower, self._weights, shape, given, patches, readings)
                if late:
                    tokens, *planes = torch.stack((tokens, *late), out=space.encoded[:, : tokens.shape[0]])
                    late = tuple(planes)
                return tokens, late, readings.rows()

            return self._pool.record(run)

        return self._encoders.get((shape, is_chosen, needs), record)()

    def _choose(
        self, space: VisionSpace, shape: VisionShape, of_kept: VisionShape, grids: Grids, numbers: tuple[int, ...]
    ) -> Tensor:
        """Choose visual tokens, and leave what the tower has to know of them; gives them in reading order."""
        per_token = self._tower.side**2
        n_tokens, n_images = shape.patches // per_token, len(grids)
        on_host = torch.zeros(n_choice_integers(n_tokens, n_images), dtype=torch.int64, pin_memory=space.choice.is_cuda)
        ChoiceInputs.of(n_tokens, n_images, on_host).fill(grids, numbers)
        space.choice[: on_host.shape[0]].copy_(on_host, non_blocking=True)
        choice = ChoiceInputs.of(n_tokens, n_images, space.choice)
        whole = VisionInputs.of(shape, per_token, space.integers)
        part = VisionInputs.of(of_kept, per_token, space.chosen)

        def run() -> Tensor:
            tokens = space.patches[: shape.patches].unflatten(0, (-1, per_token)).flatten(1)
            return choose(tokens, choice, whole, part, of_kept)

        return self._choosers.get((shape, of_kept, n_images), lambda: self._pool.record(run))()
