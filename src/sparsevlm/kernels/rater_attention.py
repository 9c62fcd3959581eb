"""What text rows look at, summed over rows and heads, without a matrix of all pairs.

Two passes over packed sequences: the first finds each row's log-sum-exp and how much of its attention falls on marked
columns, the second sums the attention that each column gets from the rows that count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .choice import takes_triton


@dataclass(frozen=True)
class Rows:
    """Query rows out of packed sequences, those of a sample together.

    Attributes
    ----------
    query : Tensor of shape (n_rows, heads, head_dim)
        Rotated.
    offsets : Tensor of shape (batch + 1,), int32
        Sample b has the rows ``offsets[b]`` to ``offsets[b + 1]``.
    ends : Tensor of shape (n_rows,), int32
        Packed index behind the last key that a row sees.
    most : int
        No sample has more rows.
    """

    query: Tensor
    offsets: Tensor
    ends: Tensor
    most: int


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
    mass : Tensor of shape (n_rows,), float32
        Attention on marked columns, mean over heads.
    """
    if takes_triton(key):
        from .triton.rater_attention import row_statistics as twin

        return twin(rows, key, key_offsets, marked, scaling)
    return row_statistics_plain(rows, key, key_offsets, marked, scaling)


def column_sums(rows: Rows, key: Tensor, key_offsets: Tensor, lse: Tensor, weight: Tensor, scaling: float) -> Tensor:
    """Second pass: ``Σ_r weight_r · mean_h exp(q_r^h · k_j^h · scaling − lse_r^h)`` over the rows that see column j.

    Parameters
    ----------
    rows, key, key_offsets, scaling
        As in :func:`row_statistics`.
    lse : Tensor of shape (n_rows, heads), float32
    weight : Tensor of shape (n_rows,), float32
        1 for raters, 0 for the others.

    Returns
    -------
    Tensor of shape (n_keys,), float32
        0 for columns of no sample.
    """
    if takes_triton(key):
        from .triton.rater_attention import column_sums as twin

        return twin(rows, key, key_offsets, lse, weight, scaling)
    return column_sums_plain(rows, key, key_offsets, lse, weight, scaling)


def row_statistics_plain(
    rows: Rows, key: Tensor, key_offsets: Tensor, marked: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The truth: sample by sample, with the matrix."""
    lse = rows.query.new_zeros(rows.query.shape[:2], dtype=torch.float32)
    mass = rows.query.new_zeros(rows.query.shape[0], dtype=torch.float32)
    for mine, keys, logits in _samples(rows, key, key_offsets, scaling):
        lse[mine] = logits.logsumexp(dim=-1)
        mass[mine] = (logits.softmax(dim=-1) * marked[keys]).sum(dim=-1).mean(dim=-1)
    return lse, mass


def column_sums_plain(
    rows: Rows, key: Tensor, key_offsets: Tensor, lse: Tensor, weight: Tensor, scaling: float
) -> Tensor:
    """The truth: sample by sample, with the matrix."""
    sums = torch.zeros(key.shape[0], dtype=torch.float32, device=key.device)
    for mine, keys, logits in _samples(rows, key, key_offsets, scaling):
        attention = (logits - lse[mine][:, :, None]).exp().mean(dim=1)
        sums[keys] = (attention * weight[mine, None]).sum(dim=0)
    return sums


def _samples(rows: Rows, key: Tensor, key_offsets: Tensor, scaling: float) -> list[tuple[slice, slice, Tensor]]:
    """Rows, keys and masked logits (rows, heads, keys) of every sample."""
    found, groups = [], rows.query.shape[1] // key.shape[1]
    row_ends, key_ends = rows.offsets.tolist(), key_offsets.tolist()
    for b in range(len(row_ends) - 1):
        mine, keys = slice(row_ends[b], row_ends[b + 1]), slice(key_ends[b], key_ends[b + 1])
        near = key[keys].repeat_interleave(groups, dim=1).float()
        logits = torch.einsum("rhd,nhd->rhn", rows.query[mine].float(), near) * scaling
        hidden = torch.arange(keys.start, keys.stop, device=key.device) >= rows.ends[mine, None]
        found.append((mine, keys, logits.masked_fill(hidden[:, None], -torch.inf)))
    return found
