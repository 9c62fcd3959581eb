"""Pivots: the Triton twin against the plain function, and that against the search on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.pivoted_cholesky import pivoted_cholesky_reference, spanning_picks_reference
from sparsevlm.kernels.triton import pivoted_cholesky as module
from sparsevlm.kernels.triton.pivoted_cholesky import pivoted_cholesky, spanning_picks
from sparsevlm.selection import greedy
from sparsevlm.selection.greedy import dpp_order

NOISE = 1e-6


def make(batch, n, size, device, seed=0, fillers=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, n, size, generator=generator)
    quality = torch.rand(batch, n, generator=generator)
    if fillers:
        rows[:, n - fillers :], quality[:, n - fillers :] = 0.0, 0.0
    return rows.to(device), quality.to(device)


@pytest.mark.parametrize("most_alone", [0, 256])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(
    ("batch", "n", "size", "n_keep", "fillers"),
    [
        (1, 1, 4, 1, 0),
        (1, 15, 40, 7, 0),
        (3, 21, 30, 12, 5),
        (2, 20, 6, 17, 0),
        (1, 260, 7, 18, 40),  # so many rows that the factor is read in two parts
        pytest.param(3, 63, 80, 30, 9, marks=pytest.mark.gpu),
        pytest.param(2, 300, 20, 45, 0, marks=pytest.mark.gpu),
        pytest.param(1, 577, 64, 20, 100, marks=pytest.mark.gpu),
    ],
)
def test_twin(batch, n, size, n_keep, fillers, rounds, most_alone, monkeypatch, device):
    """Where n_keep exceeds the size, the picks span everything before the end."""
    monkeypatch.setattr(module, "_MOST_ALONE", most_alone)
    rows, quality = make(batch, n, size, device, fillers=fillers)
    gram = rows @ rows.mT
    found = pivoted_cholesky(gram, quality, n_keep, rounds, NOISE)
    assert torch.equal(found, pivoted_cholesky_reference(gram, quality, n_keep, rounds, NOISE))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("most_blocked", "most_in_a_block"), [(0, 37), (0, 30), (8192, 37)])
@pytest.mark.parametrize(("batch", "n", "size", "n_keep"), [(2, 40, 60, 37), (1, 40, 9, 37), (1, 36, 20, 35)])
def test_blocks_of_picks_are_as_one(batch, n, size, n_keep, most_blocked, most_in_a_block, rounds, monkeypatch, device):
    """Sixteen picks a block, or one block that reads its factor in parts; with few columns all begins anew within."""
    monkeypatch.setattr(module, "_TILE", 16 * 64)
    monkeypatch.setattr(module, "_FEW", 16)
    monkeypatch.setattr(module, "_MOST_BLOCKED", most_blocked)
    monkeypatch.setattr(module, "_MOST_IN_A_BLOCK", most_in_a_block)
    rows, quality = make(batch, n, size, device)
    gram = rows @ rows.mT
    found = pivoted_cholesky(gram, quality, n_keep, rounds, NOISE)
    assert torch.equal(found, pivoted_cholesky_reference(gram, quality, n_keep, rounds, NOISE))


@pytest.mark.parametrize("most_alone", [0, 256])
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("counts", [(0, 37, 5), (20, 0, 37), (0, 0, 0)])
def test_samples_stop_after_the_picks_that_are_looked_at(counts, rounds, most_alone, monkeypatch, device):
    monkeypatch.setattr(module, "_MOST_ALONE", most_alone)
    monkeypatch.setattr(module, "_TILE", 16 * 64)
    monkeypatch.setattr(module, "_FEW", 16)
    rows, quality = make(3, 40, 30, device)
    gram = rows @ rows.mT
    stops = torch.tensor(counts, device=device)
    found = pivoted_cholesky(gram, quality, 37, rounds, NOISE, stops)
    wanted = pivoted_cholesky_reference(gram, quality, 37, rounds, NOISE)
    for one, other, count in zip(found, wanted, counts, strict=True):
        assert torch.equal(one[:count], other[:count])
        assert ((one >= 0) & (one < 40)).all()


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("kind", ["ones", "drawn"])
def test_the_plain_function_searches_as_the_rows_do(kind, rounds):
    rows, quality = make(2, 40, 60, "cpu", seed=3)
    quality = torch.ones_like(quality) if kind == "ones" else quality
    found = pivoted_cholesky_reference(rows @ rows.mT, quality, 33, rounds, NOISE)
    assert torch.equal(found, dpp_order(rows, quality, 33, rounds))


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("n", "n_keep"), [(25, 22), pytest.param(150, 140, marks=pytest.mark.gpu)])
def test_equal_rows_are_taken_in_order(n, n_keep, rounds, device):
    rows = torch.full((1, n, 8), 0.5, device=device)
    order = pivoted_cholesky(rows @ rows.mT, torch.ones(1, n, device=device), n_keep, rounds, NOISE)
    assert order[0].tolist() == list(range(n_keep))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [40, 130, 250])
def test_it_picks_the_same_each_time(n, device):
    rows, quality = make(2, n, 300, device)
    gram = rows @ rows.mT
    first = pivoted_cholesky(gram, quality, n - 5, True, NOISE)
    assert torch.equal(first, pivoted_cholesky_reference(gram, quality, n - 5, True, NOISE))
    assert all(torch.equal(pivoted_cholesky(gram, quality, n - 5, True, NOISE), first) for _ in range(300))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "n_keep"), [(1024, 700), (2304, 1200)])
def test_many_picks(n, n_keep, device):
    """Of well-separated rows: otherwise rounding decides among thousands."""
    rows, quality = make(1, n, 3000, device)
    gram = rows @ rows.mT
    quality = (1.0 - torch.arange(n, device=device) * 4e-4 * (1 + quality / 8)).clamp_min(1e-3)
    found = pivoted_cholesky(gram, quality, n_keep, True, NOISE)
    assert torch.equal(found, pivoted_cholesky_reference(gram, quality, n_keep, True, NOISE))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [577, 4097, 16384])
def test_long(n, device):
    rows, quality = make(1, n, 256, device)
    gram = rows @ rows.mT
    assert torch.equal(
        pivoted_cholesky(gram, quality, 100, True, NOISE), pivoted_cholesky_reference(gram, quality, 100, True, NOISE)
    )


@pytest.mark.parametrize("most", [1, 2 * 40 * 40, 1 << 28])
def test_the_search_by_products_is_that_on_the_rows(most, monkeypatch):
    monkeypatch.setattr(greedy, "_MAX_GRAM_ELEMENTS", most)
    rows, quality = make(5, 40, 60, "cpu", seed=3)
    found = greedy.dpp_order_by_gram(rows, quality, 33, True)
    assert torch.equal(found, dpp_order(rows, quality, 33, True))
    found = greedy.dpp_order_by_gram(rows[0], quality[0], 9, False)
    assert torch.equal(found, dpp_order(rows[0], quality[0], 9, False))


@pytest.mark.parametrize("rounds", [False, True])
def test_the_search_by_products_goes_on_when_all_is_spanned(rounds):
    """Five directions, of which each has eight rows of other lengths: the sixth pick begins the second round."""
    lengths = 1.0 + torch.rand(2, 40, generator=torch.Generator().manual_seed(5))
    rows = lengths[..., None] * torch.eye(5).repeat(8, 1)
    found = greedy.dpp_order_by_gram(rows, torch.ones(2, 40), 33, rounds)
    assert torch.equal(found, dpp_order(rows, torch.ones(2, 40), 33, rounds))
    again = found[:, 5:10] % 5
    assert (sorted(again[0].tolist()) == list(range(5))) == rounds


@pytest.mark.parametrize("most_alone", [0, 256])
@pytest.mark.parametrize(
    ("n", "rank", "most", "tile"),
    [
        (40, 30, 37, 16 * 64),
        (40, 9, 40, 16 * 64),
        (25, 25, 12, 8192),
        pytest.param(900, 400, 450, 8192, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("share", [1e-3, 0.3, 0.8, 1e6])
@pytest.mark.parametrize("least", [0, 17])
def test_picks_end_where_little_is_left(n, rank, most, tile, share, least, most_alone, monkeypatch, device):
    """Within a block of sixteen, at its end, and behind it; of three samples each after another number. Where there
    have to be more picks than it takes, they begin anew."""
    monkeypatch.setattr(module, "_MOST_ALONE", most_alone)
    monkeypatch.setattr(module, "_TILE", tile)
    monkeypatch.setattr(module, "_FEW", tile // 64)
    rows = make(3, n, rank, device)[0] * torch.logspace(0, -1.5, n, device=device)[:, None]
    rows[1, :, rank // 2 :] = 0.0
    gram = rows @ rows.mT
    enough = share * gram.diagonal(dim1=1, dim2=2).mean(dim=1) * torch.tensor([1.0, 0.5, 2.0], device=device)
    ends = enough, torch.tensor([least, 0, 3], device=device), torch.tensor([most, most, most - 2], device=device)
    order, counts = spanning_picks(gram, *ends, most, NOISE)
    wanted, how_many = spanning_picks_reference(gram, *ends, most, NOISE)
    assert counts.tolist() == how_many.tolist()
    for one, other, count in zip(order, wanted, counts.tolist(), strict=True):
        assert torch.equal(one[:count], other[:count])
