"""Clusters: the Triton twins against the plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels import clusters as plain
from sparsevlm.kernels.places import indices_of_reference
from sparsevlm.kernels.triton import clusters as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn_centres(n, numbers, n_centres, seed):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(n) < torch.tensor(numbers)[:, None]
    is_centre = torch.zeros_like(valid)
    for own, number, few in zip(is_centre, numbers, n_centres, strict=True):
        own[torch.randperm(number, generator=generator)[:few]] = True
    return valid, is_centre, generator


def check_plan(n, numbers, n_centres, seed, merge, device, most_more=0):
    """Members lie apart, each in the cluster of any of the centres."""
    valid, is_centre, generator = drawn_centres(n + most_more, numbers, n_centres, seed)
    n_tokens = n + seed % 20
    members = torch.zeros_like(valid, dtype=torch.int64)
    cluster_idx = torch.zeros_like(members)
    for b, number in enumerate(numbers):
        members[b, :number] = torch.randperm(n_tokens, generator=generator)[:number].sort().values
        centres = is_centre[b].nonzero().squeeze(-1)
        if len(centres):
            cluster_idx[b] = centres[torch.randint(len(centres), (n + most_more,), generator=generator)]
            cluster_idx[b, centres] = centres
    inputs = (members, valid, is_centre, cluster_idx)
    wanted = plain.spread_clusters_reference(*inputs, n_tokens, merge)
    found = twin.spread_clusters(*(own.to(device) for own in inputs), n_tokens, merge)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


def check_nearest(n, numbers, n_centres, seed, device, values=None):
    _, is_centre, generator = drawn_centres(n, numbers, n_centres, seed)
    most = max(1, *n_centres) + seed % 3
    centres = indices_of_reference(is_centre, most)
    similarity = torch.randint(-5, 5, (len(numbers), n, most), generator=generator) / 8
    if values is not None:
        special = values[torch.randint(len(values), similarity.shape, generator=generator)]
        similarity = torch.where(torch.rand(similarity.shape, generator=generator) < 0.3, special, similarity)
    wanted = plain.nearest_centres_reference(similarity, centres, is_centre)
    found = twin.nearest_centres(*(own.to(device) for own in (similarity, centres, is_centre)))
    assert torch.equal(found.cpu(), wanted)


@settings(max_examples=examples(12), deadline=None)
@given(data=st.data(), n=st.integers(1, 24), seed=st.integers(0, 1 << 30), merge=st.sampled_from(["mean", "sum"]))
def test_twins(data, n, seed, merge):
    """Samples with nothing, with one cluster, and with nothing but centres; most similarities are tied."""
    numbers = [data.draw(st.integers(0, n)) for _ in range(data.draw(st.integers(1, 4)))]
    n_centres = [data.draw(st.sampled_from([min(1, number), number, number // 2])) for number in numbers]
    check_plan(n, numbers, n_centres, seed, merge, DEVICE, seed % 7)
    values = torch.tensor([torch.nan, -torch.inf, torch.inf, 0.0, -0.0]) if seed % 2 else None
    check_nearest(n, numbers, n_centres, seed, DEVICE, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "size"), [(9, 20), (5, 70), pytest.param(2048, 3584, marks=pytest.mark.gpu)])
def test_unit_rows(n, size, dtype, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(twin, "_MOST_COLUMNS", 32)
    generator = torch.Generator().manual_seed(n)
    states = torch.randn(3, n, size, generator=generator).to(dtype)
    states[0, 1], states[1, 2, 3], states[2, 0, 0] = 0.0, torch.nan, torch.inf
    chosen = torch.randint(n, (3, n // 2), generator=generator)
    found = twin.unit_rows(states.to(device), chosen.to(device))
    for one, other in zip(found, plain.unit_rows_reference(states, chosen), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert torch.equal(
        found[1].nan_to_num(), found[0].gather(1, chosen.to(device)[..., None].expand(-1, -1, size)).nan_to_num()
    )


@pytest.mark.parametrize("n", [40, pytest.param(4096, marks=pytest.mark.gpu)])
def test_more_than_a_block(n, device, monkeypatch):
    if device == "cpu":
        for name in ("_BLOCK", "_MEMBERS"):
            monkeypatch.setattr(twin, name, 16)
    numbers, n_centres = [n, n // 2, 0, n], [n // 2, 1, 0, n]
    check_plan(n, numbers, n_centres, 3, "mean", device)
    check_nearest(n, numbers, n_centres, 3, device, torch.tensor([torch.nan, 0.5, 0.5]))
    check_nearest(n, numbers, n_centres, 4, device)


@pytest.mark.gpu
def test_recorded_and_repeated(captured):
    valid, is_centre, generator = drawn_centres(1500, [1500, 3, 0, 800], [700, 1, 0, 20], 0)
    centres = indices_of_reference(is_centre, 750)
    similarity = torch.randint(-5, 5, (4, 1500, 750), generator=generator) / 8
    members = torch.arange(1500).expand(4, -1) + 9
    nearest = plain.nearest_centres_reference(similarity, centres, is_centre)
    wanted = plain.spread_clusters_reference(members, valid, is_centre, nearest, 1600, "mean")

    def run(similarity, centres, is_centre, members, valid):
        found = twin.nearest_centres(similarity, centres, is_centre)
        return twin.spread_clusters(members, valid, is_centre, found, 1600, "mean")

    graph, found = captured(run, *(own.cuda() for own in (similarity, centres, is_centre, members, valid)))
    for _ in range(300):
        for own in found:
            own.zero_()
        graph.replay()
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.cpu(), other)
