"""Attention of text rows: the Triton twin against the plain functions, and those against the algorithm's own."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels import rater_attention
from sparsevlm.kernels.rater_attention import Rows
from sparsevlm.kernels.triton.rater_attention import column_sums, row_statistics
from sparsevlm.selection.scoring import text_to_visual_attention

RESOLUTION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(lengths, n_rows, heads=28, kv_heads=4, head_dim=128, dtype=torch.float32, device="cpu"):
    """Rows are the last tokens of each sample, as a question is; the first third of its keys is visual."""
    generator = torch.Generator().manual_seed(sum(lengths))
    key = torch.randn(sum(lengths) + 2, kv_heads, head_dim, generator=generator).to(device, dtype)
    query = torch.randn(sum(n_rows), heads, head_dim, generator=generator).to(device, dtype)
    offsets, row_offsets = (torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32) for sizes in (lengths, n_rows))
    marked = torch.zeros(key.shape[0], dtype=torch.bool, device=device)
    ends = []
    for end, length, n in zip(offsets.tolist()[1:], lengths, n_rows, strict=True):
        ends += range(end - n + 1, end + 1)
        marked[end - length : end - length + length // 3] = True
    rows = Rows(query, row_offsets, torch.tensor(ends, device=device, dtype=torch.int32), max(n_rows))
    return rows, key, offsets, marked


@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize(("lengths", "n_rows"), [((5,), (1,)), ((15, 63, 140), (3, 20, 7)), ((90, 200), (0, 33))])
def test_twins(lengths, n_rows, dtype, device):
    rows, key, offsets, marked = make(lengths, n_rows, dtype=dtype, device=device)
    check(rows, key, offsets, marked, RESOLUTION[dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (4, 4, 64), (6, 2, 20)])
def test_shapes(heads, kv_heads, head_dim, device):
    check(*make((70, 33), (9, 4), heads, kv_heads, head_dim, device=device), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize("length", [577, 4097, 16384])
def test_long(length, dtype, device):
    rows, key, offsets, marked = make((length, 63), (40, 5), dtype=dtype, device=device)
    check(rows, key, offsets, marked, RESOLUTION[dtype])


def check(rows, key, offsets, marked, resolution):
    scaling = rows.query.shape[2] ** -0.5
    lse, mass = row_statistics(rows, key, offsets, marked, scaling)
    wanted_lse, wanted_mass = rater_attention.row_statistics_plain(rows, key, offsets, marked, scaling)
    torch.testing.assert_close(lse, wanted_lse, rtol=resolution, atol=resolution)
    torch.testing.assert_close(mass, wanted_mass, rtol=resolution, atol=resolution)
    weight = (mass >= mass.mean()).float() if mass.numel() else mass
    sums = column_sums(rows, key, offsets, wanted_lse, weight, scaling)
    wanted = rater_attention.column_sums_plain(rows, key, offsets, wanted_lse, weight, scaling)
    torch.testing.assert_close(sums, wanted, rtol=10 * resolution, atol=resolution)


def test_the_plain_functions_are_those_of_the_algorithm():
    rows, key, offsets, marked = make((40,), (6,), heads=4, kv_heads=2, head_dim=16)
    columns = marked.nonzero().squeeze(-1)
    positions = rows.ends.long() - 1
    attention = text_to_visual_attention(
        rows.query.transpose(0, 1), key[:40].transpose(0, 1), columns, positions, 0.25, None, None, None
    )
    lse, mass = rater_attention.row_statistics_plain(rows, key, offsets, marked, 0.25)
    torch.testing.assert_close(mass, attention.sum(dim=-1))
    sums = rater_attention.column_sums_plain(rows, key, offsets, lse, torch.ones(6), 0.25)
    torch.testing.assert_close(sums[columns], attention.sum(dim=0))
