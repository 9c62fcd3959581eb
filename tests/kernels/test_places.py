"""Masks and indices: the Triton twins against the plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels.places import first_picks_reference, indices_of_reference
from sparsevlm.kernels.triton import places

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=examples(40), deadline=None)
@given(batch=st.integers(1, 5), n=st.integers(1, 70), most=st.integers(0, 80), seed=st.integers(0, 1 << 30))
def test_indices(batch, n, most, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n, generator=generator) < torch.rand(batch, 1, generator=generator)
    mask[seed % batch] = seed % 2 == 0
    assert torch.equal(places.indices_of(mask.to(DEVICE), most).cpu(), indices_of_reference(mask, most))


@settings(max_examples=examples(40), deadline=None)
@given(batch=st.integers(1, 5), n=st.integers(1, 70), data=st.data())
def test_first_picks(batch, n, data):
    """Samples of any size, of which some keep nothing and some all; what is picked late is any row."""
    numbers = torch.tensor([data.draw(st.integers(0, n)) for _ in range(batch)])
    n_keep = torch.tensor([data.draw(st.integers(0, int(number))) for number in numbers])
    valid = torch.arange(n) < numbers[:, None]
    most = max(int(n_keep.max()), data.draw(st.integers(0, n)))
    order = torch.randint(n, (batch, most))
    for own, number, kept in zip(order, numbers.tolist(), n_keep.tolist(), strict=True):
        if kept < number:
            own[:kept] = torch.randperm(number)[:kept]
    wanted = first_picks_reference(order, n_keep, valid)
    assert torch.equal(wanted.sum(dim=1), n_keep)
    found = places.first_picks(*(tensor.to(DEVICE) for tensor in (order, n_keep, valid)))
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("n", [1023, 1024, pytest.param(4096, marks=pytest.mark.gpu)])
def test_more_than_a_block(n, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(places, "_BLOCK", 64)
    generator = torch.Generator().manual_seed(n)
    n_keep = torch.tensor([n, 0, n // 3, n - 1])
    order = torch.stack([torch.randperm(n, generator=generator) for _ in n_keep])
    valid = torch.ones(len(n_keep), n, dtype=torch.bool)
    mask = first_picks_reference(order, n_keep, valid)
    found = places.first_picks(*(tensor.to(device) for tensor in (order, n_keep, valid)))
    assert torch.equal(found.cpu(), mask)
    for most in (n, n // 3, 7):
        assert torch.equal(places.indices_of(found, most).cpu(), indices_of_reference(mask, most))
