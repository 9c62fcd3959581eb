"""Orders of scores: the Triton twin against the plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels import score_order as plain
from sparsevlm.kernels.triton import score_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def check(scores, valid, n_keep):
    found = score_order.place_by_score(scores.to(DEVICE), valid.to(DEVICE))
    assert torch.equal(found.cpu(), plain.place_by_score_reference(scores, valid))
    found = score_order.highest(scores.to(DEVICE), valid.to(DEVICE), n_keep.to(DEVICE))
    assert torch.equal(found.cpu(), plain.highest_reference(scores, valid, n_keep))


@settings(max_examples=examples(25), deadline=None)
@given(
    batch=st.integers(1, 4), n=st.integers(1, 70), n_values=st.integers(1, 100), seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(DTYPES), special=st.booleans(),
)  # fmt: skip
def test_twin(batch, n, n_values, seed, dtype, special):
    """Few values: most are tied. Samples of any size, what fills them up is the highest."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-n_values, n_values, (batch, n), generator=generator) / 8
    if special:
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0])
        drawn = values[torch.randint(5, scores.shape, generator=generator)]
        scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.4, drawn, scores)
    numbers = torch.randint(n + 1, (batch,), generator=generator)
    valid = torch.arange(n) < numbers[:, None]
    n_keep = torch.randint(n + 2, (batch,), generator=generator)
    check(scores.masked_fill(~valid, 1e4).to(dtype), valid, n_keep)


def test_numbers_that_differ_in_float64_only():
    scores = torch.tensor([[1.0, 1.0 + 2.0**-40, -1.0, -1.0 - 2.0**-40]], dtype=torch.float64)
    check(scores, torch.ones(1, 4, dtype=torch.bool), torch.tensor([1]))


@pytest.mark.parametrize("n", [300, pytest.param(4096, marks=pytest.mark.gpu)])
def test_more_than_a_block(n):
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(3, n, generator=generator).bfloat16().float()
    valid = torch.arange(n) < torch.tensor([[n], [n // 2], [0]])
    check(scores, valid, torch.tensor([n // 3, 7, 0]))


@pytest.mark.gpu
def test_recorded_and_repeated(captured):
    scores = torch.randn(4, 2048, device="cuda").bfloat16().float()
    valid = torch.arange(2048, device="cuda") < torch.tensor([[2048], [1000], [1], [0]], device="cuda")
    graph, place = captured(score_order.place_by_score, scores, valid)
    wanted = plain.place_by_score_reference(scores.cpu(), valid.cpu())
    for _ in range(300):
        place.zero_()
        graph.replay()
        assert torch.equal(place.cpu(), wanted)
