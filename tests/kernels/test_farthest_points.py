"""Farthest points: the Triton twin against the plain function, and that against the search on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.farthest_points import farthest_points, farthest_points_reference
from sparsevlm.kernels.gram_matrix import gram_matrix, gram_matrix_split
from sparsevlm.kernels.triton import farthest_points as triton_module
from sparsevlm.selection import greedy
from sparsevlm.selection.similarity import unit_rows

NOISE = 1e-6


def twin(gram, valid, n_keep, noise=NOISE):
    return triton_module.farthest_points(gram, scale_of(gram), valid, n_keep, noise)


def reference(gram, valid, n_keep, noise=NOISE):
    return farthest_points_reference(gram, scale_of(gram), valid, n_keep, noise)


def scale_of(gram):
    return gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-30).rsqrt()


def first(numbers, n, device):
    """Of each sample so many rows are valid."""
    return torch.arange(n, device=device) < torch.tensor(numbers, device=device)[:, None]


def separated(batch, n, device, seed=0):
    """Matrices of which no two entries above the diagonal are nearer to each other than 2⁻¹⁸, all exact."""
    grams = torch.eye(n).repeat(batch, 1, 1)
    above = torch.triu_indices(n, n, 1)
    for b, gram in enumerate(grams):
        drawn = torch.randperm(1 << 17, generator=torch.Generator().manual_seed(seed + b))[: above.shape[1]]
        gram[above[0], above[1]] = gram[above[1], above[0]] = drawn / (1 << 18)
    return grams.to(device)


def random_unit(batch, n, size, device, seed=0):
    rows = torch.randn(batch, n, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1).to(device)


CASES = [
    (1, [1], 1),
    (15, [15], 7),
    (33, [33, 20, 1, 0], 33),
    (64, [64, 64], 30),
    pytest.param(300, [300, 120, 7], 300, marks=pytest.mark.gpu),
    pytest.param(500, [500] * 40, 60, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("n", "numbers", "n_keep"), CASES)
def test_twin(n, numbers, n_keep, device):
    gram, valid = separated(len(numbers), n, device), first(numbers, n, device)
    found = twin(gram, valid, n_keep)
    assert torch.equal(found, reference(gram, valid, n_keep))
    for order, number in zip(found.tolist(), numbers, strict=True):
        assert all(pick < number for pick in order[:number])
        assert order[number:] == list(range(number, n_keep))
        assert len(set(order)) == n_keep


def test_valid_rows_may_be_any(device):
    gram, valid = separated(1, 25, device), torch.arange(25, device=device)[None] % 3 == 1
    for search in (twin, reference):
        order = search(gram, valid, 25)[0]
        own = valid[0].nonzero().squeeze(-1)
        assert torch.equal(own[search(gram[:, own][:, :, own], valid[:, own], len(own))[0]], order[: len(own)])
        assert torch.equal(order[len(own) :], (~valid[0]).nonzero().squeeze(-1))


def test_more_rows_are_read_than_a_block(device, monkeypatch):
    monkeypatch.setattr(triton_module, "_COLUMNS", 16)
    gram, valid = separated(2, 45, device), first([45, 38], 45, device)
    assert torch.equal(twin(gram, valid, 40), reference(gram, valid, 40))


def test_fewer_picks_are_a_part_from_the_left(device):
    gram, valid = separated(2, 24, device), first([24, 15], 24, device)
    whole = twin(gram, valid, 24)
    for n_keep in (1, 9, 20):
        assert torch.equal(twin(gram, valid, n_keep), whole[:, :n_keep])


def test_equal_rows_are_taken_in_order(device):
    rows = torch.nn.functional.normalize(torch.full((1, 21, 8), 0.3, device=device), dim=-1)
    for search in (twin, reference):
        assert search(rows @ rows.mT, first([21], 21, device), 20)[0].tolist() == list(range(20))


def test_a_row_of_length_0_is_similar_to_nothing(device):
    """Rows 0 and 2 are 1 from all others, those from each other as well; 1 and 3 are 0.4 apart."""
    rows = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.6, 0.8]]], device=device)
    for search in (twin, reference):
        assert search(rows @ rows.mT, first([4], 4, device), 4)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_copies_are_apart_from_nothing_whatever_their_products_lack(length, device):
    """One over the root of 53 lies badly between two values of bfloat16: the products of every other row with itself
    and its copies lack more than noise, so that the cosines would say that these lie apart, and are to come first."""
    rows = random_unit(1, 13, 53, device).sign()
    rows[:, 1::2] = torch.eye(53, device=device)[:6]
    rows = torch.nn.functional.normalize(rows, dim=-1).repeat(1, 4, 1)[:, :40] * length
    gram = gram_matrix_split(rows, rows)
    assert length != 1.0 or (1.0 - gram.diagonal(dim1=-2, dim2=-1) > 10 * NOISE).sum() > 15
    for search in (twin, reference):
        order = search(gram, first([40], 40, device), 30)[0].tolist()
        assert {pick % 13 for pick in order[:13]} == set(range(13))
        assert order[13:] == [i for i in range(40) if i not in order[:13]][:17]


@pytest.mark.parametrize("n_keep", [1, 7, 29])
@pytest.mark.parametrize("size", [6, 40])
def test_the_plain_function_searches_as_the_rows_do(size, n_keep):
    unit = random_unit(3, 30, size, "cpu")
    found = reference(unit @ unit.mT, first([30] * 3, 30, "cpu"), n_keep)
    for one, order in zip(unit, found, strict=True):
        assert torch.equal(order.sort().values, greedy.farthest_points(one, n_keep))


def test_the_search_on_rows_takes_the_products_where_they_fit(monkeypatch):
    calls = []

    def noted(gram, *given):
        calls.append(gram.shape)
        return farthest_points(gram, *given)

    unit = unit_rows(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)))
    wanted = greedy.farthest_points(unit, 11)
    monkeypatch.setattr(greedy, "use_triton", lambda tensor: True)
    monkeypatch.setattr(greedy, "farthest_points_of_gram", noted)
    assert torch.equal(greedy.farthest_points(unit, 11), wanted)
    monkeypatch.setattr(greedy, "_MAX_GRAM_ELEMENTS", 40 * 40 - 1)
    assert torch.equal(greedy.farthest_points(unit, 11), wanted)
    assert calls == [(1, 40, 40)]


def check_picks(unit, order):
    """No pick is nearer to those before it than the farthest row by more than 1e-5."""
    exact = 1.0 - unit.double() @ unit.double().T
    distance = exact.clone().fill_diagonal_(torch.inf).amin(dim=-1)
    for step, pick in enumerate(order.tolist()):
        left = distance.clone()
        left[order[:step]] = -torch.inf
        assert left[pick] >= left.max() - 1e-5, step
        distance = torch.minimum(distance, exact[pick]) if step else exact[pick]
    assert len(set(order.tolist())) == len(order)


@pytest.mark.parametrize(
    ("n", "n_keep"),
    [(50, 40), *(pytest.param(*case, marks=pytest.mark.gpu) for case in ((577, 144), (4097, 300), (16384, 100)))],
)
def test_every_pick_is_nearly_the_farthest(n, n_keep, device):
    unit = random_unit(1, n, 128, device)
    check_picks(unit[0], twin(gram_matrix(unit), first([n], n, device), n_keep)[0])


@pytest.mark.gpu
def test_it_can_be_captured(captured, device):
    gram, valid = separated(3, 200, device), first([200, 90, 31], 200, device)
    graph, found = captured(farthest_points, gram, valid, 64, NOISE)
    gram.copy_(separated(3, 200, device, seed=9))
    valid.copy_(first([55, 200, 140], 200, device))
    graph.replay()
    assert torch.equal(found, reference(gram, valid, 64))
