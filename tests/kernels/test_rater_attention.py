"""Attention of text rows: the Triton twin against the plain functions, and those against the algorithm's own."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsevlm.kernels import rater_attention
from sparsevlm.kernels.rater_attention import Columns, PaddedRows, Rows
from sparsevlm.kernels.triton.rater_attention import (
    padded_attention,
    padded_statistics,
    row_attention,
    row_statistics,
)
from sparsevlm.selection.scoring import text_to_visual_attention

RESOLUTION = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


# Heads, those of keys, and their size: small ones in Triton's interpreter, those of a model on a GPU.
SIZES = [(4, 2, 16), pytest.param((28, 4, 128), marks=pytest.mark.gpu)]


def make(lengths, n_rows, heads=28, kv_heads=4, head_dim=128, dtype=torch.float32, device="cpu"):
    """Rows are the last tokens of each sample, as a question is; the first third of its keys is visual."""
    generator = torch.Generator().manual_seed(sum(lengths))
    key = torch.randn(sum(lengths) + 2, kv_heads, head_dim, generator=generator).to(device, dtype)
    query = torch.randn(sum(n_rows), heads, head_dim, generator=generator).to(device, dtype)
    cu_seqlens, row_offsets = (
        torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32) for sizes in (lengths, n_rows)
    )
    marked = torch.zeros(key.shape[0], dtype=torch.bool, device=device)
    ends = []
    for end, length, n in zip(cu_seqlens.tolist()[1:], lengths, n_rows, strict=True):
        ends += range(end - n + 1, end + 1)
        marked[end - length : end - length + length // 3] = True
    rows = Rows(query, row_offsets, torch.tensor(ends, device=device, dtype=torch.int32), max(n_rows))
    return rows, key, cu_seqlens, marked


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize(("lengths", "n_rows"), [((5,), (1,)), ((15, 63, 140), (3, 20, 7)), ((90, 200), (0, 33))])
def test_twins(lengths, n_rows, dtype, sizes, device):
    """The last case has more rows, times the heads of a group, and more keys than a block."""
    rows, key, cu_seqlens, marked = make(lengths, n_rows, *sizes, dtype=dtype, device=device)
    check(rows, key, cu_seqlens, marked, RESOLUTION[dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (4, 4, 64), (6, 2, 20)])
def test_shapes(heads, kv_heads, head_dim, device):
    check(*make((70, 33), (9, 4), heads, kv_heads, head_dim, device=device), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize("length", [577, 4097, 16384])
def test_long(length, dtype, device):
    rows, key, cu_seqlens, marked = make((length, 63), (40, 5), dtype=dtype, device=device)
    check(rows, key, cu_seqlens, marked, RESOLUTION[dtype])


def columns_of(cu_seqlens, marked):
    """The marked keys of every sample; what fills up is another sample's."""
    own = [marked[start:end].nonzero().squeeze(-1) + start for start, end in itertools.pairwise(cu_seqlens.tolist())]
    keys = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=marked.shape[0] - 1)
    return Columns(keys, torch.tensor([one.shape[0] for one in own], dtype=torch.int32, device=marked.device))


def check(rows, key, cu_seqlens, marked, resolution):
    scaling = rows.query.shape[2] ** -0.5
    lse, mass = row_statistics(rows, key, cu_seqlens, marked, scaling)
    wanted_lse, wanted_mass = rater_attention.row_statistics_reference(rows, key, cu_seqlens, marked, scaling)
    torch.testing.assert_close(lse, wanted_lse, rtol=resolution, atol=resolution)
    torch.testing.assert_close(mass, wanted_mass, rtol=resolution, atol=resolution)
    n_samples, n_heads = cu_seqlens.shape[0] - 1, lse.shape[1]
    weight = torch.rand(n_samples, n_heads, device=key.device).softmax(dim=-1)
    columns = columns_of(cu_seqlens, marked)
    attention = row_attention(rows, key, columns, wanted_lse, weight, scaling)
    wanted = rater_attention.row_attention_reference(rows, key, columns, wanted_lse, weight, scaling)
    torch.testing.assert_close(attention, wanted, rtol=10 * resolution, atol=resolution / 10)


@pytest.mark.parametrize("most", [None, 1 << 9])
@pytest.mark.parametrize("n_top_heads", [None, 2])
def test_the_plain_functions_are_those_of_the_algorithm(n_top_heads, most, monkeypatch):
    if most is not None:
        monkeypatch.setattr(rater_attention, "_MAX_BLOCK_ELEMENTS", most)
    rows, key, cu_seqlens, marked = make((9, 40), (0, 6), heads=4, kv_heads=2, head_dim=16)
    columns = columns_of(cu_seqlens, marked)
    own = columns.keys[1, : columns.numbers[1]]
    attention = text_to_visual_attention(
        rows.query.transpose(0, 1), key[9:49].transpose(0, 1), own - 9, rows.ends.long() - 10, 0.25, None, None,
        n_top_heads,
    )  # fmt: skip
    lse, mass = rater_attention.row_statistics_reference(rows, key, cu_seqlens, marked, 0.25)
    weight = torch.full((2, 4), 0.25)
    if n_top_heads is not None:
        weight = torch.zeros(2, 4).index_fill_(1, mass.sum(dim=0).topk(n_top_heads).indices, 1 / n_top_heads)
    found = rater_attention.row_attention_reference(rows, key, columns, lse, weight, 0.25)
    torch.testing.assert_close(found[:, : own.shape[0]], attention)
    assert not found[:, own.shape[0] :].any()
    torch.testing.assert_close((mass * weight[1]).sum(dim=-1), attention.sum(dim=-1))


def test_a_row_sees_no_key_behind_its_end(device):
    rows, key, cu_seqlens, _ = make((40, 70), (6, 20), heads=4, kv_heads=2, head_dim=16, device=device)
    everything = torch.ones(key.shape[0], dtype=torch.bool, device=device)
    columns, weight = columns_of(cu_seqlens, everything), torch.full((2, 4), 0.25, device=device)
    for first, second in (
        (row_statistics, row_attention),
        (rater_attention.row_statistics_reference, rater_attention.row_attention_reference),
    ):
        lse, mass = first(rows, key, cu_seqlens, everything, 0.25)
        attention = second(rows, key, columns, lse, weight, 0.25)
        torch.testing.assert_close(mass, torch.ones_like(mass))
        torch.testing.assert_close(attention.sum(dim=1), torch.ones(26, device=device))
        assert not attention[0, 35:].any()  # its own end is key 35
        assert attention[0, 34] > 0


def make_padded(lengths, n_rows, n_visual, sizes, dtype, device, room=3, seed=0):
    """Rows and columns anywhere in each sample, in views of larger tensors; what fills up is another sample's."""
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, head_dim = sizes
    total = sum(lengths) + 2
    query, key = (torch.randn(total, n, head_dim, generator=generator).to(device, dtype) for n in (heads, kv_heads))
    starts = [0, *itertools.accumulate(lengths)]

    def drawn(numbers, most):
        found = torch.randint(total, (len(lengths), most + 7), generator=generator)
        for b, n in enumerate(numbers):
            found[b, :n] = starts[b] + torch.randperm(lengths[b], generator=generator)[:n].sort().values
        return found.to(device)[:, :most], torch.tensor(numbers, device=device)

    rows = PaddedRows(query, *drawn(n_rows, max(n_rows) + room))
    columns = Columns(*drawn(n_visual, max(n_visual) + room))
    marked = torch.zeros(total, dtype=torch.bool, device=device)
    for own, n in zip(columns.keys, n_visual, strict=True):
        marked[own[:n]] = True
    return rows, key, columns, marked, torch.tensor(starts, dtype=torch.int32, device=device)


PADDED = [
    ((9,), (3,), (5,)),
    ((70, 0, 33, 140), (20, 0, 33, 3), (40, 0, 7, 90)),
    ((30, 12, 5, 1, 8), (1, 1, 0, 1, 1), (12, 0, 5, 1, 0)),
]


@pytest.mark.parametrize("sizes", [*SIZES, (6, 2, 20)], ids=str)
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize(("lengths", "n_rows", "n_visual"), PADDED)
def test_padded_twins(lengths, n_rows, n_visual, dtype, sizes, device):
    check_padded(*make_padded(lengths, n_rows, n_visual, sizes, dtype, device), RESOLUTION[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(RESOLUTION))
@pytest.mark.parametrize(("n_text", "n_visual"), [(60, 256), (128, 4096), (1, 4096)])
def test_padded_of_a_real_size(n_text, n_visual, dtype, device):
    numbers = ((n_visual + n_text + 20, 400, 0), (n_text, min(n_text, 9), 0), (n_visual, 0, 0))
    check_padded(*make_padded(*numbers, (28, 4, 128), dtype, device), RESOLUTION[dtype])


def check_padded(rows, key, columns, marked, cu_seqlens, resolution):
    scaling = rows.query.shape[2] ** -0.5
    wanted_lse, wanted_mass = rater_attention.padded_statistics_reference(rows, key, cu_seqlens, marked, scaling)
    lse, mass = padded_statistics(rows, key, cu_seqlens, marked, scaling)
    torch.testing.assert_close(lse, wanted_lse, rtol=resolution, atol=resolution)
    torch.testing.assert_close(mass, wanted_mass, rtol=resolution, atol=resolution)
    alone, nothing = padded_statistics(rows, key, cu_seqlens, None, scaling)
    assert nothing is None
    assert torch.equal(alone, lse)
    for weight in (None, torch.rand(rows.index.shape[0], lse.shape[2], device=key.device).softmax(dim=-1)):
        given = (rows, key, columns, wanted_lse, weight, scaling)
        found, wanted = padded_attention(*given), rater_attention.padded_attention_reference(*given)
        torch.testing.assert_close(found, wanted, rtol=10 * resolution, atol=resolution / 10)
        counts = (
            rows.counts[..., None]
            & (torch.arange(found.shape[2], device=key.device) < columns.numbers[:, None])[:, None]
        )
        assert not found[~counts].any()
