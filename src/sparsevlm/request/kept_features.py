"""Visual features of a conversation, as they enter the decoder: taken from one prompt, given to a later one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models import Layout, ModelAdapter, n_tokens
from .inputs import end_of_input
from .step import VisionRows

# Beside the sizes of videos: what their positions in time depend on.
_TIMES = ("second_per_grid_ts", "video_second_per_grid")


@dataclass(frozen=True)
class RowFeatures:
    """Images and videos of one prompt, in its order.

    Attributes
    ----------
    tokens : Tensor of shape (n_tokens, hidden_size)
        Inputs of the decoder that are no plain embeddings.
    late : tuple of Tensor of shape (n_tokens, hidden_size)
        What is added to the output of the first layers.
    vision : VisionRows, optional
        What a selector has had read in the tower.
    layouts : tuple of (kind, Layout)
        Of each image or video; empty: not known.
    sizes : dict of Tensor
        Arguments that positions depend on, one row an image or video.
    """

    tokens: Tensor
    late: tuple[Tensor, ...] = ()
    vision: VisionRows | None = None
    layouts: tuple[tuple[str, Layout], ...] = ()
    sizes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Bytes that it holds."""
        read = () if self.vision is None else (self.vision.vision_attention, self.vision.vision_keys)
        held = [tensor for tensor in (self.tokens, *self.late, *read) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def first(self, n: int, adapter: ModelAdapter) -> RowFeatures:
        """Images of the first ``n`` tokens.

        Raises
        ------
        ValueError
            If these are not whole images.
        """
        if n == self.tokens.shape[0]:
            return self
        n_images = so_far = 0
        for _, layout in self.layouts:
            if so_far >= n:
                break
            n_images, so_far = n_images + 1, so_far + n_tokens(layout)
        if so_far != n:
            raise ValueError(
                f"the cache was cropped to {n} of {self.tokens.shape[0]} visual tokens, which are not whole images. "
                "Crop it between images, or begin anew with a new cache."
            )
        taken, kinds = self.layouts[:n_images], size_names(adapter)
        counts = {name: sum(kind == kinds[name] for kind, _ in taken) for name in self.sizes}
        return RowFeatures(
            self.tokens[:n],
            tuple(rows[:n] for rows in self.late),
            None if self.vision is None else self.vision.at(torch.arange(n, device=self.tokens.device)),
            taken,
            {name: value[: counts[name]] for name, value in self.sizes.items()},
        )

    def followed_by(self, new: RowFeatures) -> RowFeatures:
        """These, and images of a later turn behind them."""
        if not (self.tokens.shape[0] and new.tokens.shape[0]):
            return self if self.tokens.shape[0] else new
        vision = None
        if self.vision is not None and new.vision is not None:
            vision = VisionRows.joined([self.vision, new.vision])
        both = bool(self.layouts and new.layouts)
        return RowFeatures(
            torch.cat([self.tokens, new.tokens]),
            tuple(torch.cat(pair) for pair in zip(self.late, new.late, strict=True)),
            vision,
            (*self.layouts, *new.layouts) if both else (),
            {
                name: torch.cat([row.sizes[name] for row in (self, new) if name in row.sizes])
                for name in {**self.sizes, **new.sizes}
            },
        )


@dataclass(frozen=True)
class KeptFeatures:
    """Images and videos of a batch of prompts.

    Attributes
    ----------
    rows : tuple of RowFeatures
        By prompt.
    kinds : tuple of str
        That there are among them, in the order of the model's.
    token_ids : frozenset of int
        Tokens in whose places the features stand.
    """

    rows: tuple[RowFeatures, ...]
    kinds: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()

    @property
    def n_tokens(self) -> int:
        """Of all prompts."""
        return sum(row.tokens.shape[0] for row in self.rows)

    @property
    def n_bytes(self) -> int:
        """Bytes that they hold; copies of a prompt share them."""
        return sum(row.n_bytes for row in {id(row): row for row in self.rows}.values())

    def at(self, row_idx: Iterable[int]) -> KeptFeatures:
        """Those of some prompts."""
        return dataclasses.replace(self, rows=tuple(self.rows[i] for i in row_idx))

    def places(self, ids: Tensor) -> Tensor:
        """Where they stand among tokens, (batch, length), bool."""
        known = torch.tensor(sorted(self.token_ids), device=ids.device, dtype=ids.dtype)
        return torch.isin(ids, known)

    def followed_by(self, new: KeptFeatures, adapter: ModelAdapter) -> KeptFeatures:
        """These, and those of a later turn behind them."""
        return KeptFeatures(
            tuple(row.followed_by(more) for row, more in zip(self.rows, new.rows, strict=True)),
            tuple(kind for kind in adapter.modalities if kind in (*self.kinds, *new.kinds)),
            self.token_ids | new.token_ids,
        )

    def masks(self, adapter: ModelAdapter, ids: Tensor) -> dict[str, Tensor]:
        """Placeholders among tokens, (batch, length), by kind."""
        return {kind: ids == adapter.modalities[kind].token_id for kind in self.kinds}

    @property
    def layouts(self) -> dict[str, Sequence[Layout] | None]:
        """Of all images in order, by kind, where they are known."""
        if any(row.tokens.shape[0] and not row.layouts for row in self.rows):
            return dict.fromkeys(self.kinds)
        found = [pair for row in self.rows for pair in row.layouts]
        return {kind: [layout for of, layout in found if of == kind] for kind in self.kinds}

    @property
    def sizes(self) -> dict[str, Tensor]:
        """Arguments that positions depend on, of all images in order."""
        names = dict.fromkeys(name for row in self.rows for name in row.sizes)
        return {name: torch.cat([row.sizes[name] for row in self.rows if name in row.sizes]) for name in names}

    def of_rows(self, batch: int) -> list[RowFeatures]:
        """By row of a batch, in which every prompt may stand several times."""
        copies = batch // max(1, len(self.rows))
        return [row for row in self.rows for _ in range(copies)]


def rows_of(
    adapter: ModelAdapter,
    ids: Tensor,
    kinds: Sequence[str],
    tokens: Sequence[Tensor],
    late: Sequence[Sequence[Tensor]],
    vision: Sequence[VisionRows],
    layouts: Sequence[Sequence[Layout]],
    given: Mapping[str, Any],
) -> tuple[RowFeatures, ...]:
    """Put together what the images of some prompts have become.

    Parameters
    ----------
    adapter : ModelAdapter
    ids : Tensor of shape (n_prompts, length), int64
    kinds : sequence of str
        Of visual input that the prompts bring.
    tokens : sequence of Tensor of shape (n_tokens, hidden_size)
        By prompt.
    late : sequence of sequence of Tensor
        By layer and prompt.
    vision : sequence of VisionRows
        By prompt; empty: nothing was read.
    layouts : sequence of sequence of Layout
        By prompt; empty where they are not known.
    given : mapping
        Arguments of the call.

    Raises
    ------
    NotImplementedError
        If it cannot be told which image is of which prompt.
    """
    known = zip(ids.tolist(), layouts or [()] * len(ids), strict=True)
    of_rows = [_by_kind(adapter, row, kinds, own) for row, own in known]
    sizes = _sizes(adapter, kinds, of_rows, given)
    return tuple(
        RowFeatures(
            tokens[b],
            tuple(of_layer[b] for of_layer in late),
            vision[b] if vision else None,
            of_rows[b],
            sizes[b],
        )
        for b in range(len(ids))
    )


def _by_kind(
    adapter: ModelAdapter, ids: list[int], kinds: Sequence[str], layouts: Sequence[Layout]
) -> tuple[tuple[str, Layout], ...]:
    """Layouts of a prompt with the kinds of their images."""
    of_token = {adapter.modalities[kind].token_id: kind for kind in reversed(kinds)}
    found: list[tuple[str, Layout]] = []
    position = 0
    for layout in layouts:
        while position < len(ids) and ids[position] not in of_token:
            position += 1
        if position == len(ids):
            return ()
        kind = of_token[ids[position]]
        found.append((kind, layout))
        end = end_of_input(ids, position, n_tokens(layout), adapter.modalities[kind].in_parts)
        if end is None:
            return ()
        position = end
    return tuple(found)


def size_names(adapter: ModelAdapter) -> dict[str, str]:
    """Arguments that positions depend on, and the kind whose images they tell of."""
    names = {name: kind for kind, modality in adapter.modalities.items() for name in modality.size_inputs}
    return {**names, **(dict.fromkeys(_TIMES, "video") if "video" in adapter.modalities else {})}


def _sizes(
    adapter: ModelAdapter,
    kinds: Sequence[str],
    layouts: Sequence[Sequence[tuple[str, Layout]]],
    given: Mapping[str, Any],
) -> list[dict[str, Tensor]]:
    """Arguments that positions depend on, by prompt."""
    found: list[dict[str, Tensor]] = [{} for _ in layouts]
    for name, kind in size_names(adapter).items():
        if kind not in kinds or given.get(name) is None:
            continue
        value = torch.as_tensor(given[name])
        counts = [sum(of == kind for of, _ in own) for own in layouts]
        if len(layouts) == 1:
            counts = [value.shape[0]]
        if sum(counts) != value.shape[0]:
            raise NotImplementedError(
                f"{name} tells of {value.shape[0]} inputs, and which of {len(layouts)} prompts each belongs to is not "
                "known, so that they cannot be kept for later questions. Send one prompt at a time, or choose "
                "turns='first'."
            )
        for own, part in zip(found, value.split(counts), strict=True):
            if part.shape[0]:
                own[name] = part
    return found
