"""Attention of text rows to the visual tokens, mean over heads, without a matrix of all pairs.

Two passes over packed sequences: the first finds each row's log-sum-exp and how much of its attention falls on marked
columns, the second the attention itself, of the rows to the columns that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import use_triton

# Upper bound of the elements of one (rows, heads, keys) float32 block: 64 Mi elements = 256 MiB.
_MAX_BLOCK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Rows:
    """Query rows out of packed sequences, those of a sample together.

    Attributes
    ----------
    query : Tensor of shape (n_rows, heads, head_dim)
        Rotated.
    cu_seqlens : Tensor of shape (batch + 1,), int32
        Sample b has the rows ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
    ends : Tensor of shape (n_rows,), int32
        Packed index behind the last key that a row sees.
    most : int
        No sample has more rows.
    """

    query: Tensor
    cu_seqlens: Tensor
    ends: Tensor
    most: int


@dataclass(frozen=True)
class Columns:
    """Keys out of packed sequences that the attention to is asked for.

    Attributes
    ----------
    keys : Tensor of shape (batch, most), int64
        Packed indices; those of a sample come first, what fills up behind them is any index.
    numbers : Tensor of shape (batch,), int32
        How many of them count.
    """

    keys: Tensor
    numbers: Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Query rows out of packed sequences, filled up to as many of each sample; each sees the keys up to its own.

    Attributes
    ----------
    query : Tensor of shape (n_keys, heads, head_dim)
        Rotated, of all rows.
    index : Tensor of shape (batch, most), int64
        Packed indices.
    numbers : Tensor of shape (batch,), int64
        How many of a sample's count.
    """

    query: Tensor
    index: Tensor
    numbers: Tensor

    @property
    def counts(self) -> Tensor:
        """Mask of what counts, (batch, most)."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.numbers[:, None]

    @property
    def packed(self) -> Rows:
        """The same one after the other; those that fill up see nothing."""
        batch, most = self.index.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.index.device) * most
        ends = torch.where(self.counts, self.index + 1, 0).flatten().int()
        return Rows(self.query[self.index.flatten()], starts, ends, most)


def row_statistics(
    rows: Rows, key: Tensor, key_offsets: Tensor, marked: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """First pass.

    Parameters
    ----------
    rows : Rows
    key : Tensor of shape (n_keys, kv_heads, head_dim)
        Rotated.
    key_offsets : Tensor of shape (batch + 1,), int32
    marked : Tensor of shape (n_keys,), bool
        Visual columns.
    scaling : float

    Returns
    -------
    lse : Tensor of shape (n_rows, heads), float32
    mass : Tensor of shape (n_rows, heads), float32
        Attention on marked columns.
    """
    if use_triton(key):
        from .triton.rater_attention import row_statistics as triton_version

        return triton_version(rows, key, key_offsets, marked, scaling)
    return row_statistics_reference(rows, key, key_offsets, marked, scaling)


def row_attention(rows: Rows, key: Tensor, columns: Columns, lse: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """Second pass: ``Σ_h weight_h · exp(q_r^h · k_j^h · scaling − lse_r^h)`` for every row and column of a sample.

    Parameters
    ----------
    rows, key, scaling
        As in :func:`row_statistics`.
    columns : Columns
    lse : Tensor of shape (n_rows, heads), float32
    weight : Tensor of shape (batch, heads), float32
        Share of each head in the mean.

    Returns
    -------
    Tensor of shape (n_rows, most), float32
        0 for columns that a row does not see, and for what fills up.
    """
    if use_triton(key):
        from .triton.rater_attention import row_attention as triton_version

        return triton_version(rows, key, columns, lse, weight, scaling)
    return row_attention_reference(rows, key, columns, lse, weight, scaling)


def padded_statistics(
    rows: PaddedRows, key: Tensor, key_offsets: Tensor, marked: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """:func:`row_statistics` of rows filled up, each of shape (batch, most, heads); 0 for what fills up.

    The mass is not taken where nothing is marked.
    """
    if use_triton(key):
        from .triton.rater_attention import padded_statistics as triton_version

        return triton_version(rows, key, key_offsets, marked, scaling)
    return padded_statistics_reference(rows, key, key_offsets, marked, scaling)


def padded_statistics_reference(
    rows: PaddedRows, key: Tensor, key_offsets: Tensor, marked: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """Reference in plain torch."""
    shape, counts = (*rows.index.shape, rows.query.shape[1]), rows.counts[..., None]
    all_or_none = key.new_zeros(key.shape[0], dtype=torch.bool) if marked is None else marked
    found = row_statistics_reference(rows.packed, key, key_offsets, all_or_none, scaling)
    lse, mass = (torch.where(counts, one.view(shape), 0.0) for one in found)
    return lse, None if marked is None else mass


def padded_attention(
    rows: PaddedRows, key: Tensor, columns: Columns, lse: Tensor, weight: Tensor | None, scaling: float
) -> Tensor:
    """:func:`row_attention` of rows filled up, (batch, most_rows, most_columns), float32; 0 for what fills up.

    ``lse`` is of shape (batch, most_rows, heads). Without ``weight`` all heads have the same share.
    """
    if use_triton(key):
        from .triton.rater_attention import padded_attention as triton_version

        return triton_version(rows, key, columns, lse, weight, scaling)
    return padded_attention_reference(rows, key, columns, lse, weight, scaling)


def padded_attention_reference(
    rows: PaddedRows, key: Tensor, columns: Columns, lse: Tensor, weight: Tensor | None, scaling: float
) -> Tensor:
    """Reference in plain torch."""
    batch, n_heads = columns.keys.shape[0], rows.query.shape[1]
    if weight is None:
        weight = lse.new_full((batch, n_heads), 1 / n_heads)
    flat = row_attention_reference(rows.packed, key, columns, lse.flatten(0, 1), weight, scaling)
    return torch.where(rows.counts[..., None], flat.view(*rows.index.shape, -1), 0.0)


def row_statistics_reference(
    rows: Rows, key: Tensor, key_offsets: Tensor, marked: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Reference in plain torch: sample by sample, some rows at a time, with all their logits."""
    lse = rows.query.new_zeros(rows.query.shape[:2], dtype=torch.float32)
    mass = torch.zeros_like(lse)
    bounds = key_offsets.tolist()
    keys = [torch.arange(bounds[b], bounds[b + 1], device=key.device) for b in range(len(bounds) - 1)]
    for b, some, logits in _logits(rows, key, keys, scaling):
        lse[some] = logits.logsumexp(dim=-1)
        mass[some] = (logits - lse[some][:, :, None]).exp()[:, :, marked[keys[b]]].sum(dim=-1)
    return lse, mass


def row_attention_reference(
    rows: Rows, key: Tensor, columns: Columns, lse: Tensor, weight: Tensor, scaling: float
) -> Tensor:
    """Reference in plain torch, likewise."""
    out = torch.zeros((rows.query.shape[0], columns.keys.shape[1]), dtype=torch.float32, device=key.device)
    keys = [own[:n] for own, n in zip(columns.keys, columns.numbers.tolist(), strict=True)]
    for b, some, logits in _logits(rows, key, keys, scaling):
        attention = (logits - lse[some][:, :, None]).exp()
        out[some, : keys[b].shape[0]] = torch.einsum("rhn,h->rn", attention, weight[b])
    return out


def _logits(rows: Rows, key: Tensor, keys: list[Tensor], scaling: float) -> Iterator[tuple[int, slice, Tensor]]:
    """Sample, some of its rows, and their masked logits (rows, heads, keys) for some keys of the sample."""
    n_heads, groups, bounds = rows.query.shape[1], rows.query.shape[1] // key.shape[1], rows.cu_seqlens.tolist()
    for b, own in enumerate(keys):
        near = key[own].float().repeat_interleave(groups, dim=1)
        step = max(1, _MAX_BLOCK_ELEMENTS // max(1, n_heads * own.shape[0]))
        for start in range(bounds[b], bounds[b + 1], step):
            some = slice(start, min(start + step, bounds[b + 1]))
            logits = torch.einsum("rhd,nhd->rhn", rows.query[some].float() * scaling, near)
            hidden = own >= rows.ends[some, None]
            yield b, some, logits.masked_fill_(hidden[:, None], -torch.inf)
