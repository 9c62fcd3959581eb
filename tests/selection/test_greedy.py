"""The greedy kernels and similarities against references written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsevlm.selection import greedy, similarity
from sparsevlm.selection.greedy import cover, dpp_map, dpp_order, farthest_points
from sparsevlm.selection.similarity import min_max, nearest_rows, row_chunks, unit_rows


def cosines(unit):
    return unit.double() @ unit.double().T


def best(gain, taken):
    return max((i for i in range(len(gain)) if i not in taken), key=lambda i: (float(gain[i]), -i))


def farthest_by_definition(unit, n_keep):
    distance = 1 - cosines(unit)
    picks = [best([min(row[j] for j in range(len(row)) if j != i) for i, row in enumerate(distance)], [])]
    while len(picks) < n_keep:
        picks.append(best(distance[:, picks].min(dim=1).values, picks))
    return sorted(picks)


def dpp_by_determinants(unit, quality, n_keep):
    kernel = quality.double()[:, None] * cosines(unit) * quality.double()
    picks = []
    while len(picks) < n_keep:
        gain = [torch.linalg.det(kernel[[*picks, i]][:, [*picks, i]]) for i in range(len(kernel))]
        picks.append(best(gain, picks))
    return sorted(picks)


def cover_by_definition(values, n_keep, factor):
    picks = []
    while len(picks) < n_keep:
        current = values[:, picks].max(dim=1).values if picks else torch.zeros(len(values), dtype=values.dtype)
        gain = (values - current.clamp_min(0)[:, None]).clamp_min(0).sum(dim=0)
        picks.append(best(gain * factor, picks))
    return sorted(picks)


def random_unit(n, dim, seed):
    return unit_rows(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_keep", [1, 2, 7, 13])
def test_farthest_points(seed, n_keep):
    unit = random_unit(14, 6, seed)
    assert farthest_points(unit, n_keep).tolist() == farthest_by_definition(unit, n_keep)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_keep", [1, 2, 5, 8])
def test_dpp_follows_the_determinants(seed, n_keep):
    unit = random_unit(9, 12, seed)
    quality = torch.rand(9, generator=torch.Generator().manual_seed(seed + 50))
    assert dpp_map(unit, quality, n_keep).tolist() == dpp_by_determinants(unit, quality, n_keep)


def test_dpp_beyond_the_rank_goes_by_quality():
    """Three picks span all of R³; every larger determinant is 0."""
    unit = torch.cat([torch.eye(3), unit_rows(torch.ones(4, 3))])
    quality = torch.tensor([1.0, 0.9, 0.8, 0.1, 0.2, 0.4, 0.3])
    assert dpp_map(unit, quality, 3).tolist() == [0, 1, 2]
    assert dpp_map(unit, quality, 5).tolist() == [0, 1, 2, 5, 6]


def test_dpp_in_rounds_starts_anew_beyond_the_rank():
    """Then the longest is first again, and what it explains is not."""
    rows = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 2.5], [0.0, 2.0], [1.0, 0.0]])
    for n_keep, wanted in enumerate([[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]], start=1):
        assert dpp_map(rows, torch.ones(5), n_keep, rounds=True).tolist() == wanted
    assert dpp_map(rows, torch.ones(5), 3).tolist() == [0, 1, 2]  # by quality, ties to the lower index


def test_a_round_begins_with_the_longest_of_what_is_left():
    """The second row is taken in the first round and not spanned in the second, which ends without it."""
    rows = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.5, 0.0], [2.0, 0.0], [1.0, 0.0]])
    ones = torch.ones(5)
    assert dpp_order(rows, ones, 5, rounds=True).tolist() == [0, 1, 3, 4, 2]
    assert dpp_order(rows, ones, 5).tolist() == [0, 1, 2, 3, 4]
    quality = torch.tensor([1.0, 1.0, 1.0, 0.4, 0.1])  # the gains are 0.25, 0.64 and 0.01 in the second round
    assert dpp_order(rows, quality, 5, rounds=True).tolist() == [0, 1, 3, 2, 4]


@pytest.mark.parametrize("seed", range(4))
def test_what_rounding_leaves_of_copies_decides_nothing(seed):
    """Three copies of five rows: when one of each is picked the determinants are 0, and nothing is left to cover."""
    unit = random_unit(5, 7, seed).repeat(3, 1)
    quality = torch.rand(15, generator=torch.Generator().manual_seed(seed))
    order = dpp_order(unit, quality, 14).tolist()
    assert {pick % 5 for pick in order[:5]} == set(range(5))
    assert order[5:] == sorted(order[5:], key=lambda pick: -quality[pick])
    apart = farthest_points(unit, 5).tolist()
    assert {pick % 5 for pick in apart} == set(range(5))
    others = [i for i in range(15) if i not in apart]
    assert farthest_points(unit, 9).tolist() == sorted([*apart, *others[:4]])
    alike = cover(unit, unit, 9, value=lambda cosine, rows: cosine.mul(1000).round() / 3)  # of copies exactly
    assert alike.tolist() == list(range(9))


def test_dpp_knows_what_is_spanned_whatever_the_scale():
    rows = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 2.5, 1.0]])
    for scale in (1e-4, 1.0, 1e4):
        for seed in range(5):
            mixing = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))
            picks = dpp_map(mixing @ rows * scale, torch.ones(12), 6, rounds=True)
            one = dpp_map(mixing @ rows, torch.ones(12), 6, rounds=True)
            assert picks.tolist() == one.tolist()


def test_dpp_stays_exact_over_many_steps():
    """Picks from 60 dimensions: the residual of what they span must not drift."""
    unit = random_unit(80, 60, 0)
    whole = dpp_map(unit, torch.ones(80), 60)
    assert torch.linalg.matrix_rank(unit[whole].double()) == 60


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_keep", [1, 3, 10, 15])
@pytest.mark.parametrize("held", [0, 5 * 16, 1 << 20])
def test_cover(seed, n_keep, held, monkeypatch):
    """Whether all, some or none of the values are held."""
    monkeypatch.setattr(greedy, "_MAX_HELD_ELEMENTS", held)
    unit = random_unit(16, 5, seed)
    covered = torch.cat([random_unit(4, 5, seed + 50), unit])
    factor = torch.rand(16, generator=torch.Generator().manual_seed(seed + 99))
    wanted = cover_by_definition(covered.double() @ unit.double().T, n_keep, factor.double())
    assert cover(covered, unit, n_keep, factor).tolist() == wanted
    sharp = cover_by_definition((covered.double() @ unit.double().T * 3).exp(), n_keep, torch.ones(16).double())
    assert cover(covered, unit, n_keep, value=lambda cosine, rows: (cosine * 3).exp()).tolist() == sharp


@pytest.mark.parametrize("n_keep", [1, 4, 11])
def test_chunks_change_nothing(n_keep, monkeypatch):
    unit, quality = random_unit(30, 8, 1), torch.rand(30, generator=torch.Generator().manual_seed(2))

    def all_of_them():
        return [
            farthest_points(unit, n_keep).tolist(),
            dpp_map(unit, quality, n_keep).tolist(),
            cover(unit, unit, n_keep, quality).tolist(),
            nearest_rows(unit, unit[:5])[1].tolist(),
        ]

    whole = all_of_them()
    monkeypatch.setattr(similarity, "_MAX_BLOCK_ELEMENTS", 64)  # two rows
    monkeypatch.setattr(greedy, "_MAX_HELD_ELEMENTS", 100)  # three rows
    assert all_of_them() == whole


def test_the_steps_wait_for_no_value():
    """On tensors without values whatever would copy one to the host raises."""
    with FakeTensorMode():
        unit, quality = torch.empty(20, 8), torch.empty(20)
        assert farthest_points(unit, 9).shape == dpp_map(unit, quality, 9).shape == (9,)
        assert dpp_map(unit, quality, 9, rounds=True).shape == (9,)


@pytest.mark.parametrize("n_keep", [1, 5, 11])
def test_identical_rows_are_taken_in_order(n_keep):
    unit = unit_rows(torch.full((12, 7), 0.3))
    wanted = list(range(n_keep))
    assert farthest_points(unit, n_keep).tolist() == wanted
    assert dpp_map(unit, torch.ones(12), n_keep).tolist() == wanted
    assert cover(unit, unit, n_keep).tolist() == wanted


def test_row_chunks_partition_the_rows():
    assert row_chunks(0, 5) == []
    assert [len(range(10)[rows]) for rows in row_chunks(10, similarity._MAX_BLOCK_ELEMENTS // 4)] == [4, 4, 2]
    assert len(row_chunks(3, 10 * similarity._MAX_BLOCK_ELEMENTS)) == 3


def test_min_max():
    assert min_max(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0.0, 1.0, 0.5]
    assert min_max(torch.tensor([0.3, 0.3 + 3e-8])).tolist() == [1.0, 1.0]


def test_nearest_rows_break_ties_by_lower_index():
    targets = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    cosine, idx = nearest_rows(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), targets)
    assert idx.tolist() == [1, 0]
    assert cosine.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_unit_rows(value):
    assert unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]
    with pytest.raises(ValueError, match="NaN or infinity"):
        unit_rows(torch.tensor([[value, 1.0]]))
