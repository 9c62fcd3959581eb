"""Coverage: the Triton twin against the plain function, and that against the search on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from sparsevlm.kernels.coverage import coverage, coverage_reference
from sparsevlm.kernels.triton import coverage as triton_module
from sparsevlm.selection import greedy
from sparsevlm.selection.similarity import unit_rows

NOISE = 1e-12
twin = triton_module.coverage


def first(numbers, n, device):
    """Of each sample so many rows are valid."""
    return torch.arange(n, device=device) < torch.tensor(numbers, device=device)[:, None]


def whole_numbers(n_covered, numbers, n, device, seed=0):
    """Values, factors and valid candidates whose gains are exact in float64, in whatever order they are added; a
    third of the values is below 0, and a sample's candidates that fill up would cover most."""
    generator = torch.Generator().manual_seed(seed)
    valid = first(numbers, n, "cpu")
    values = torch.randint(-(1 << 19), 1 << 20, (len(numbers), n_covered, n), generator=generator).float()
    values = values.where(valid[:, None], 2.0**20)
    factor = torch.randint(1, 1 << 20, (len(numbers), n), generator=generator) / (1 << 20)
    return values.to(device), factor.to(device), valid.to(device)


CASES = [
    (1, 1, [1], 1),
    (9, 15, [15], 7),
    (50, 33, [33, 20, 1, 0], 33),
    (40, 70, [70, 64], 20),
    pytest.param(300, 300, [300, 120, 7], 300, marks=pytest.mark.gpu),
    pytest.param(517, 500, [500] * 40, 60, marks=pytest.mark.gpu),
    pytest.param(100, 256, [200] * 200, 20, marks=pytest.mark.gpu),
    pytest.param(4160, 4096, [4096], 200, marks=pytest.mark.gpu),
    pytest.param(9000, 5000, [5000], 100, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("n_covered", "n", "numbers", "n_keep"), CASES)
def test_twin(n_covered, n, numbers, n_keep, device):
    given = whole_numbers(n_covered, numbers, n, device)
    found = twin(*given, n_keep, NOISE)
    assert torch.equal(found, coverage_reference(*given, n_keep, NOISE))
    for order, number in zip(found.tolist(), numbers, strict=True):
        assert all(pick < number for pick in order[:number])
        assert order[number:] == list(range(number, n_keep))
        assert len(set(order)) == n_keep


def test_lists_longer_than_a_block(device, monkeypatch):
    monkeypatch.setattr(triton_module, "_CHUNK", 16)
    given = whole_numbers(75, [30], 30, device)
    assert torch.equal(twin(*given, 12, NOISE), coverage_reference(*given, 12, NOISE))


def test_valid_candidates_may_be_any(device):
    values, factor, _ = whole_numbers(20, [25], 25, device)
    valid = torch.arange(25, device=device)[None] % 3 == 1
    own = valid[0].nonzero().squeeze(-1)
    for search in (twin, coverage_reference):
        order = search(values, factor, valid, 25, NOISE)[0]
        alone = search(values[..., own], factor[:, own], valid[:, own], len(own), NOISE)[0]
        assert torch.equal(own[alone], order[: len(own)])
        assert torch.equal(order[len(own) :], (~valid[0]).nonzero().squeeze(-1))


def test_rows_that_fill_up_count_for_nothing(device):
    values, factor, valid = whole_numbers(20, [25, 18], 25, device)
    filled = torch.cat([values, values.new_zeros(2, 6, 25), values.new_full((2, 5, 25), -1.0)], dim=1)
    for search in (twin, coverage_reference):
        found = search(filled, factor, valid, 20, NOISE)
        assert torch.equal(found, search(values, factor, valid, 20, NOISE))


def test_fewer_picks_are_a_part_from_the_left(device):
    given = whole_numbers(30, [24, 15], 24, device)
    whole = twin(*given, 24, NOISE)
    for n_keep in (1, 9, 20):
        assert torch.equal(twin(*given, n_keep, NOISE), whole[:, :n_keep])


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
def test_equal_candidates_are_taken_in_order(value, device):
    values, ones = torch.full((1, 11, 21), value, device=device), torch.ones(1, 21, device=device)
    for search in (twin, coverage_reference):
        assert search(values, ones, ones.bool(), 20, NOISE)[0].tolist() == list(range(20))


def test_what_rounding_leaves_of_copies_decides_nothing(device):
    """Three copies of seven candidates: when one of each is picked nothing is left to cover."""
    values = torch.rand(1, 40, 7, generator=torch.Generator().manual_seed(1)).to(device).repeat(1, 1, 3)
    ones = torch.ones(1, 21, device=device)
    for search in (twin, coverage_reference):
        order = search(values, ones, ones.bool(), 15, NOISE)[0].tolist()
        assert sorted(order[:7]) == list(range(7))
        assert order[7:] == list(range(7, 15))


def test_a_factor_of_0_comes_last(device):
    values, factor, valid = whole_numbers(200, [16], 16, device)
    factor[:, :4] = 0.0
    for search in (twin, coverage_reference):
        assert search(values, factor, valid, 16, NOISE)[0, -4:].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("n_keep", [1, 7, 29])
@pytest.mark.parametrize("n_text", [0, 4])
def test_the_plain_function_searches_as_the_rows_do(n_text, n_keep):
    generator = torch.Generator().manual_seed(n_keep)
    units = torch.nn.functional.normalize(torch.randn(3, n_text + 30, 12, generator=generator), dim=-1)
    factor = torch.rand(3, 30, generator=generator)
    found = coverage_reference(units @ units[:, n_text:].mT, factor, first([30] * 3, 30, "cpu"), n_keep, NOISE)
    for one, weight, order in zip(units, factor, found, strict=True):
        assert torch.equal(order.sort().values, greedy.cover(one, one[n_text:], n_keep, weight))


@pytest.mark.parametrize("with_value", [False, True])
def test_the_search_on_rows_takes_the_values_where_they_fit(with_value, monkeypatch):
    calls = []

    def noted(values, *given):
        calls.append(values.shape)
        return coverage(values, *given)

    generator = torch.Generator().manual_seed(0)
    unit, text = (unit_rows(torch.randn(n, 16, generator=generator)) for n in (40, 3))
    covered, sharpness = torch.cat([text, unit]), torch.linspace(1.0, 9.0, 43)
    options = {"value": lambda cosine, rows: (cosine * sharpness[rows, None]).exp()} if with_value else {}
    wanted = greedy.cover(covered, unit, 11, **options)
    monkeypatch.setattr(greedy, "use_triton", lambda tensor: True)
    monkeypatch.setattr(greedy, "coverage", noted)
    assert torch.equal(greedy.cover(covered, unit, 11, **options), wanted)
    monkeypatch.setattr(greedy, "_MAX_HELD_ELEMENTS", 40 * 43 - 1)
    assert torch.equal(greedy.cover(covered, unit, 11, **options), wanted)
    assert calls == [(1, 43, 40)]


def check_picks(values, factor, order):
    """No pick gains less than the best candidate by more than 1e-5 of that."""
    values, current = values.double(), values.new_zeros(values.shape[0], dtype=torch.float64)
    for step, pick in enumerate(order.tolist()):
        gain = (values - current[:, None]).clamp_min(0.0).sum(dim=0) * factor
        gain[order[:step]] = -torch.inf
        assert gain[pick] >= (1.0 - 1e-5) * gain.max(), step
        current = torch.maximum(current, values[:, pick])
    assert len(set(order.tolist())) == len(order)


LONG = [pytest.param(*case, marks=pytest.mark.gpu) for case in ((600, 577, 144), (4160, 4096, 256), (8000, 8192, 64))]


@pytest.mark.parametrize(("n_covered", "n", "n_keep"), [(60, 50, 40), *LONG])
def test_every_pick_gains_nearly_most(n_covered, n, n_keep, device):
    generator = torch.Generator().manual_seed(0)
    covered, unit = (torch.randn(count, 32, generator=generator).to(device) for count in (n_covered, n))
    values = torch.nn.functional.normalize(covered, dim=-1) @ torch.nn.functional.normalize(unit, dim=-1).mT
    factor = torch.rand(n, generator=generator).to(device)
    valid = torch.ones(1, n, dtype=torch.bool, device=device)
    check_picks(values, factor, twin(values[None], factor[None], valid, n_keep, NOISE)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [24, 60, 200])
def test_it_picks_the_same_each_time(n, device):
    """Also where there are fewer rows than a program has threads, so that several of them hold each."""
    given = whole_numbers(n, [n, n - 4], n, device)
    wanted = coverage_reference(*given, n - 3, NOISE)
    assert all(torch.equal(coverage(*given, n - 3, NOISE), wanted) for _ in range(300))


@pytest.mark.gpu
def test_it_can_be_captured(captured, device):
    given = whole_numbers(230, [200, 90, 31], 200, device)
    graph, found = captured(lambda *inputs: coverage(*inputs, 64, NOISE), *given)
    for numbers in ([55, 200, 140], [200, 200, 3]):
        for tensor, other in zip(given, whole_numbers(230, numbers, 200, device, seed=numbers[0]), strict=True):
            tensor.copy_(other)
        graph.replay()
        assert torch.equal(found, coverage_reference(*given, 64, NOISE))
