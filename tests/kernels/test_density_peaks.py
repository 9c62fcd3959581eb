"""Density peaks: the Triton twins against the plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels import density_peaks as plain
from sparsevlm.kernels.triton import density_peaks as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(numbers, n, size, seed, dtype=torch.float32):
    """States of samples of some numbers of tokens; what fills up is no number."""
    generator = torch.Generator().manual_seed(seed)
    states = (torch.randn(len(numbers), n, size, generator=generator) + 2).to(dtype)
    valid = torch.arange(n) < torch.tensor(numbers)[:, None]
    return states.masked_fill(~valid[..., None], torch.nan), valid


def same(one, other, valid):
    torch.testing.assert_close(
        one.cpu().masked_fill(~valid, 0), other.cpu().masked_fill(~valid, 0), rtol=0, atol=0, equal_nan=True
    )


def check(states, valid, n_clusters, n_rows=None, device=None):
    """Out of the same products the same numbers, to the last bit where no logarithm is taken."""
    device = device or DEVICE
    points, squares = plain.centred_points_reference(states, valid)
    n, n_clusters = points.shape[1], torch.tensor(n_clusters)
    most, n_rows = max(1, int(n_clusters.max())), n_rows or n
    products = points @ points.mT
    log_density = torch.empty_like(squares)
    starts = range(0, n, n_rows)
    for start in starts:
        rows = slice(start, start + n_rows)
        inputs = (products[:, rows], squares, valid, n_clusters)
        wanted = plain.log_densities_reference(*inputs, most, start)
        found = twin.log_densities(*(own.to(device) for own in inputs), start)
        same(found, wanted, valid[:, rows])
        log_density[:, rows] = wanted
    for start in starts:
        rows = slice(start, start + n_rows)
        inputs = (products[:, rows], squares, valid, log_density)
        wanted = plain.peak_scores_reference(*inputs, start)
        found = twin.peak_scores(*(own.to(device) for own in inputs), start)
        same(found, wanted, valid[:, rows])


@settings(max_examples=examples(8), deadline=None)
@given(data=st.data(), n=st.integers(1, 16), size=st.integers(1, 12), seed=st.integers(0, 1 << 30))
def test_twin(data, n, size, seed):
    numbers = [data.draw(st.integers(0, n)) for _ in range(data.draw(st.integers(1, 4)))]
    n_clusters = [data.draw(st.integers(0, number + 3)) for number in numbers]
    states, valid = drawn(numbers, n, size, seed)
    if data.draw(st.booleans()):  # most are as far from each other as others are
        states = states.round()
    check(states, valid, n_clusters, data.draw(st.integers(1, n)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("more", [0, 5])
def test_what_is_no_number_is_none_in_both(value, more):
    states, valid = drawn([11, 4], 11 + more, 8, 0)
    states[0, 3, 2] = value
    check(states, valid, [4, 2])


def test_some_distances_are_no_number(device):
    """The products alone hold NaN: it is farther than all else, and a sum with it is none."""
    states, valid = drawn([9], 9, 6, 1)
    points, squares = plain.centred_points_reference(states, valid)
    products = points @ points.mT
    products[0, 2, 5:] = products[0, 4, 0] = torch.nan
    for n_clusters in (1, 4, 5, 8):
        inputs = (products, squares, valid, torch.tensor([n_clusters]))
        wanted = plain.log_densities_reference(*inputs, 8, 0)
        assert bool(wanted[0, 2].isnan()) == (n_clusters > 4)
        same(twin.log_densities(*(own.to(device) for own in inputs), 0), wanted, valid)
        for density in (wanted, torch.zeros_like(wanted), torch.full_like(wanted, torch.nan)):
            inputs = (products, squares, valid, density)
            same(
                twin.peak_scores(*(own.to(device) for own in inputs), 0), plain.peak_scores_reference(*inputs, 0), valid
            )


@pytest.mark.parametrize("n", [1, 2, 3, 20])
def test_equal_states(n, device):
    states = torch.full((2, n, 12), 0.3)
    valid = torch.arange(n) < torch.tensor([[n], [n // 2]])
    check(states, valid, [2, 1])
    points, squares = twin.centred_points(states.to(device), valid.to(device))
    assert not points.any()
    assert not squares.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("numbers", "n", "size"),
    [([9, 0, 1, 5], 9, 20), ([30], 33, 70), pytest.param([4096], 4096, 3584, marks=pytest.mark.gpu)],
)
def test_points(numbers, n, size, dtype, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(twin, "_MOST_COLUMNS", 32)
    states, valid = drawn(numbers, n, size, 0, dtype)
    found = twin.centred_points(states.to(device), valid.to(device))
    for one, other in zip(found, plain.centred_points_reference(states, valid), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2e-5, atol=2e-6)


def test_a_row_of_many_blocks(device, monkeypatch):
    """Rows that no program holds."""
    monkeypatch.setattr(twin, "_BLOCKS", (4, 8))
    states, valid = drawn([17, 9], 17, 6, 0)
    for n in (4, 8, 9, 17):
        check(states[:, :n], valid[:, :n], [5, 12], 11, device)
    states[0, 3, 2] = torch.nan
    check(states[:1], valid[:1], [5], None, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("numbers", "n"), [([300], 300), ([1024, 0, 7, 900], 1024), ([4096], 4096), ([5000], 5000)])
def test_of_a_real_size(numbers, n):
    states, valid = drawn(numbers, n, 256, n)
    check(states, valid, [n // 2 for _ in numbers], 2048)
    check(states, valid, [n // 10 + 1 for _ in numbers], 2048)


@pytest.mark.gpu
def test_recorded_and_repeated(captured):
    states, valid = (own.cuda() for own in drawn([1500, 3, 0, 800], 1500, 64, 0))
    n_clusters = torch.tensor([700, 1, 0, 90], device="cuda")

    def run(states, valid, n_clusters):
        points, squares = twin.centred_points(states, valid)
        products = points @ points.mT
        log_density = twin.log_densities(products, squares, valid, n_clusters, 0)
        return twin.peak_scores(products, squares, valid, log_density, 0)

    graph, scores = captured(run, states, valid, n_clusters)
    graph.replay()
    wanted = scores.clone()
    for _ in range(300):
        scores.zero_()
        graph.replay()
        same(scores, wanted, valid.cpu())
