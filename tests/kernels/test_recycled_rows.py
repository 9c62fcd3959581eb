"""Best and recycled tokens: the Triton twin against the plain function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels.recycled_rows import clusters_within, recycled_rows_reference
from sparsevlm.kernels.triton import recycled_rows as triton_module
from sparsevlm.kernels.triton.recycled_rows import recycled_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def check(n, n_visual, n_keep, given_clusters, tau, theta, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randperm(n, generator=generator) for _ in n_visual])
    n_visual, n_keep = torch.tensor(n_visual), torch.tensor(n_keep)
    clusters = clusters_within(n_visual, n_keep, n, tau, theta) if given_clusters else None
    inputs = (place, n_visual, n_keep, clusters)
    wanted = recycled_rows_reference(*inputs, n, tau, theta)
    found = recycled_rows(*(own if own is None else own.to(device) for own in inputs), n, tau, theta)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


@settings(max_examples=examples(40), deadline=None)
@given(data=st.data(), n=st.integers(1, 70), tau=st.floats(0, 1), theta=st.floats(0, 1), is_given=st.booleans())
def test_twin(data, n, tau, theta, is_given):
    """Some samples lose nothing, or have nothing."""
    n_visual = [data.draw(st.integers(0, n)) for _ in range(data.draw(st.integers(1, 4)))]
    n_keep = [data.draw(st.integers(0, number)) for number in n_visual]
    check(n, n_visual, n_keep, is_given, tau, theta, DEVICE)


@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize("n", [300, pytest.param(4096, marks=pytest.mark.gpu)])
def test_more_than_a_block(n, is_given, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(triton_module, "_BLOCK", 16)
    for tau, theta in ((0.5, 0.5), (1.0, 1.0), (0.3, 0.1), (0.0, 0.5)):
        check(n, [n, n // 2, n], [n - 5, n // 4, n], is_given, tau, theta, device)
