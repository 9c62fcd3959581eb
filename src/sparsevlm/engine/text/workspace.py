"""Tensors that the decoder's programs share: each works on their first rows, so that one follows the other in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.close_up import gather_rows
from ...models import ModelAdapter
from ...request.step import VisionRows
from ..capacities import power_of_two, row_capacity
from ..cuda_graphs import to_device
from ..fused_weights import FusedWeights
from .layer import rotary_tables

# Target layers that drop something, at most; what a request brings holds counts for so many.
MOST_STAGES = 16
_LEAST_ROWS, _LEAST_BATCH = 2048, 8
# Up to so many rows every layer has room for all of them, whatever is dropped: then options may change.
_MOST_EVEN = 1 << 13


@dataclass(frozen=True)
class Room:
    """What a request takes, or a workspace holds.

    Attributes
    ----------
    rows, batch : int
        Rows of all samples together, padding included, and samples.
    by_layer : tuple of int
        Rows whose keys and values a layer holds.
    """

    rows: int
    batch: int
    by_layer: tuple[int, ...]

    def holds(self, other: Room) -> bool:
        """Tells whether a request has room."""
        layers = zip(self.by_layer, other.by_layer, strict=True)
        return other.rows <= self.rows and other.batch <= self.batch and all(own >= asked for own, asked in layers)

    def grown(self, wanted: Room) -> Room:
        """Room that is made for a request which this does not hold: with some to spare, since all programs are captured
        anew then."""
        rows = row_capacity(max(_LEAST_ROWS, _grown(wanted.rows, self.rows)))
        by_layer = (rows,) * len(wanted.by_layer)
        if rows > _MOST_EVEN:
            layers = zip(wanted.by_layer, self.by_layer or (0,) * len(by_layer), strict=True)
            by_layer = tuple(min(rows, row_capacity(max(_LEAST_ROWS, _grown(*layer)))) for layer in layers)
        return Room(rows, power_of_two(max(_LEAST_BATCH, wanted.batch, self.batch)), by_layer)


NO_ROOM = Room(0, 0, ())


def _grown(wanted: int, before: int) -> int:
    return max(wanted, before + before // 4) if wanted > before else before


@dataclass(frozen=True)
class PromptShape:
    """Capacities of what a prompt brings.

    Attributes
    ----------
    rows : int
        Of all samples together.
    batch : int
    n_visual : int
        Visual tokens of the sample with the most.
    n_text : int
        Likewise, of the text that is read; 0: none is.
    has_coordinates : bool
        Whether the coordinates of visual tokens are read.
    """

    rows: int
    batch: int
    n_visual: int
    n_text: int = 0
    has_coordinates: bool = False


@dataclass(frozen=True)
class PromptInputs:
    """What a prompt brings, as parts of one tensor, which crosses to the device in one copy.

    Attributes
    ----------
    ids : Tensor of shape (rows,), int64
    positions : Tensor of shape (n_axes, rows), int64
    feature_rows : Tensor of shape (rows,), int64
        Row of the vision tower's output that stands for a token; -1 for text and padding.
    visual_rows : Tensor of shape (batch, n_visual), int64
        Packed rows of every sample's visual tokens.
    cu_seqlens : Tensor of shape (batch + 1,), int64
    counts : Tensor of shape (MOST_STAGES, batch), int64
        Visual tokens that leave each target that drops something; -1: the rank decides.
    image_idx : Tensor of shape (batch, n_visual), int64
        Image of every visual token.
    min_keep_per_image : Tensor of shape (batch,), int64
        Floor of each image of a sample, 0 where there is one alone.
    n_visual, n_text : Tensor of shape (batch,), int64
    text_rows : Tensor of shape (batch, n_text), int64
        Packed rows of the text that is read.
    seeds : Tensor of shape (MOST_STAGES, batch), int64
        For selectors that draw.
    coordinates : Tensor of shape (batch, 3, n_visual), int64
        Of every visual token; empty where they are not read.
    """

    ids: Tensor
    positions: Tensor
    feature_rows: Tensor
    visual_rows: Tensor
    cu_seqlens: Tensor
    counts: Tensor
    image_idx: Tensor
    min_keep_per_image: Tensor
    n_visual: Tensor
    n_text: Tensor
    text_rows: Tensor
    seeds: Tensor
    coordinates: Tensor

    @classmethod
    def of(cls, shape: PromptShape, n_axes: int, integers: Tensor) -> PromptInputs:
        """Views of the first of ``integers``."""
        shapes = _shapes(shape, n_axes)
        sizes = list(map(math.prod, shapes))
        parts = integers[: sum(sizes)].split(sizes)
        return cls(*(part if len(one) == 1 else part.view(one) for part, one in zip(parts, shapes, strict=True)))


def _shapes(shape: PromptShape, n_axes: int) -> list[tuple[int, ...]]:
    rows, batch = shape.rows, shape.batch
    visual: tuple[int, ...] = (batch, shape.n_visual)
    stages, one_each = (MOST_STAGES, batch), (batch,)
    per_row = [(rows,), (n_axes, rows), (rows,), visual, (batch + 1,)]
    coordinates = (batch, 3, shape.n_visual if shape.has_coordinates else 0)
    return [*per_row, stages, visual, one_each, one_each, one_each, (batch, shape.n_text), stages, coordinates]


def n_integers(shape: PromptShape, n_axes: int) -> int:
    """Integers that a prompt brings."""
    return sum(math.prod(one) for one in _shapes(shape, n_axes))


class Workspace:
    """Room for one request.

    Parameters
    ----------
    adapter : ModelAdapter
    weights : FusedWeights
    room : Room

    Attributes
    ----------
    integers : Tensor, int64
        What the prompt brings, see :class:`PromptInputs`.
    features : Tensor of shape (rows, hidden_size)
        Of the vision tower.
    feature_rows : Tensor of shape (rows,), int64
        Where each row of the prompt is among them; -1: nowhere.
    vision_attention, vision_keys : Tensor of shape (2, rows) and (rows, head_dim), float32
        Readings of the vision tower, in the order of ``features``.
    hidden, previous : Tensor of shape (rows, hidden_size)
        Output and input of the last layer that ran; the input lies where the features were.
    query, read_keys : Tensor of shape (rows, heads, head_dim) and (rows, kv_heads, head_dim)
        Rotated, of the last layer that ran.
    cos, sin : Tensor of shape (rows, head_dim)
    late : list of Tensor of shape (rows, hidden_size)
        By layer, what is added to the output of the first ones: features of visual tokens, 0 for others.
    cu_seqlens : Tensor of shape (batch + 2,), int32
        The last sequence is padding.
    layer_cu_seqlens : Tensor of shape (n_layers, batch + 2), int32
        The same as each layer saw it.
    keys, values : list of Tensor of shape (room.by_layer[layer], kv_heads, head_dim)
        By layer: what the prompt left there.
    visual_rows, alive : Tensor of shape (batch, rows), int64
        Packed row of every visual token that is left, and its index among those that the prompt brought; ascending.
    image_idx : Tensor of shape (batch, rows), int64
        Image of every visual token that is left.
    coordinates : Tensor of shape (batch, 3, rows), int64
        Of every visual token of the prompt.
    text_rows : Tensor of shape (batch, rows), int64
    is_rater : Tensor of shape (batch, rows), bool
        Which of the text that is read votes, where that is known before the decoder.
    min_keep_per_image, n_visual, n_text : Tensor of shape (batch,), int64
        ``n_visual`` counts what is left.
    counts, seeds : Tensor of shape (MOST_STAGES, batch), int64
    stage : Tensor of shape (1,), int64
        How many targets have dropped something.
    is_faulty : Tensor of shape (1,), bool
        Whether a choice met NaN or infinity.
    """

    def __init__(self, adapter: ModelAdapter, weights: FusedWeights, room: Room) -> None:
        weight, block = adapter.decoder.embed.weight, weights.blocks[0]
        size, device = weight.shape[1], weight.device
        self.room, self.n_axes = room, adapter.decoder.n_position_axes
        rows, batch = room.rows, room.batch
        heads, kv_heads = (one.weight.shape[0] // block.head_dim for one in (block.query, block.key))

        def indices(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.integers = indices(n_integers(PromptShape(rows, batch, rows, rows, True), self.n_axes))
        self.features, self.hidden = (weight.new_zeros((rows, size)) for _ in range(2))
        self.previous = self.features  # which nobody reads once there is a layer
        tower = adapter.vision.program
        of_keys = 0 if tower is None else tower.blocks[-1].qkv.weight.shape[0] // (3 * tower.blocks[-1].n_heads)
        self.vision_attention, self.vision_keys = (
            indices(*shape, dtype=torch.float32) for shape in ((2, rows), (rows, of_keys))
        )
        self.query, self.read_keys = (weight.new_zeros((rows, n, block.head_dim)) for n in (heads, kv_heads))
        self.late = [torch.zeros_like(self.hidden) for _ in range(adapter.decoder.n_late)]
        cos, _ = rotary_tables(adapter.decoder, self.hidden[:1], indices(self.n_axes, 1))
        self.cos, self.sin = (cos.new_zeros((rows, cos.shape[-1])) for _ in range(2))
        self.cu_seqlens = indices(batch + 2, dtype=torch.int32)
        self.layer_cu_seqlens = indices(len(weights.blocks), batch + 2, dtype=torch.int32)
        self.keys, self.values = (
            [weight.new_zeros((n, kv_heads, block.head_dim)) for n in room.by_layer] for _ in range(2)
        )
        self.visual_rows, self.alive, self.image_idx, self.text_rows = (indices(batch, rows) for _ in range(4))
        self.feature_rows, self.coordinates = indices(rows), indices(batch, 3, rows)
        self.min_keep_per_image, self.n_visual, self.n_text = (indices(batch) for _ in range(3))
        self.counts, self.seeds = (indices(MOST_STAGES, batch) for _ in range(2))
        self.is_rater, self.stage = indices(batch, rows, dtype=torch.bool), indices(1)
        self.is_faulty = indices(1, dtype=torch.bool)

    @property
    def moved(self) -> list[Tensor]:
        """Tensors whose rows are those of the tokens that are left."""
        return [self.hidden, self.cos, self.sin, *self.late]

    def place_late(self, late: Sequence[Tensor], feature_rows: Tensor) -> None:
        """Take what is added behind the first layers.

        Parameters
        ----------
        late : sequence of Tensor of shape (n_features, hidden_size)
            By layer.
        feature_rows : Tensor of shape (n_rows,), int64
            Which of them belongs to each row of the prompt; -1: none.
        """
        for plane, features in zip(self.late, late, strict=True):
            own = features[feature_rows.clamp_min(0)]
            plane[: feature_rows.shape[0]] = own.masked_fill_(feature_rows[:, None] < 0, 0.0)

    @property
    def bytes_per_row(self) -> int:
        """Of the keys and values of one row of one layer."""
        return 2 * self.keys[0][0].numel() * self.keys[0].element_size()

    def snapshot(self, rows: int) -> Callable[[], None]:
        """Remember what a prune step or a segment moves on; the function that is given takes it back."""
        tensors = [*(tensor[:rows] for tensor in self.moved), self.visual_rows, self.alive, self.image_idx]
        tensors += [self.text_rows, self.n_visual, self.cu_seqlens, self.stage, self.is_faulty]
        before = [tensor.clone() for tensor in tensors]

        def rewind() -> None:
            torch._foreach_copy_(tensors, before)

        return rewind

    def take_readings(self, read: VisionRows | None) -> None:
        """Take what was read of the vision tower."""
        if read is not None and read.vision_attention is not None:
            self.vision_attention[:, : read.n_visual] = read.vision_attention
        if read is not None and read.vision_keys is not None:
            self.vision_keys[: read.n_visual] = read.vision_keys

    def gather(self, rows: Tensor) -> None:
        """Let only some rows go on."""
        gather_rows(rows, self.hidden, self.cos, self.sin)
        for plane in self.late:
            plane[: rows.shape[0]] = plane[rows]

    def begin_stage(self, starts: Sequence[int], batch: int) -> None:
        """Take the first row of every sample, and the number of all rows, from the host; further samples are empty."""
        cu_seqlens = [*starts, *[starts[-1]] * (batch + 1 - len(starts))]
        own = self.cu_seqlens[: len(cu_seqlens)]
        own.copy_(to_device(torch.tensor(cu_seqlens, dtype=torch.int32), own.device))
