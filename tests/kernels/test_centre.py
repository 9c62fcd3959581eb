"""Centring: the Triton twin against the plain function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels.centre import centre_reference
from sparsevlm.kernels.triton import centre as triton_module
from sparsevlm.kernels.triton.centre import centre

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What the twin takes as it is.
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def drawn(batch, n, size, seed, dtype=torch.float32, common=3.0):
    generator = torch.Generator().manual_seed(seed)
    shared = common * torch.randn(batch, 1, size, generator=generator)
    return (shared + torch.randn(batch, n, size, generator=generator)).to(dtype)


def check(states, valid, device):
    wanted = centre_reference(states.clone(), valid)
    given = states.clone().to(device)
    found = centre(given, valid.to(device))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-5, atol=2e-6)
    assert torch.equal(found.cpu().any(dim=-1), wanted.any(dim=-1))
    if states.dtype != torch.float32:
        assert torch.equal(given.cpu().nan_to_num(), states.nan_to_num())


@settings(max_examples=examples(15), deadline=None)
@given(
    batch=st.integers(1, 5), n=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from(DTYPES), mask=st.sampled_from(["first", "any"]),
)  # fmt: skip
def test_twin(batch, n, size, seed, dtype, mask):
    """Samples of any size, empty ones among them; what fills up is no number."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(n) < torch.randint(n + 1, (batch, 1), generator=generator)
    if mask == "any":
        valid = valid[:, torch.randperm(n, generator=generator)]
    states = drawn(batch, n, size, seed, dtype)
    valid[:, :1] &= valid.sum(dim=1, keepdim=True) != 1  # what is left of one state alone is rounding in both
    check(states.masked_fill(~valid[..., None], torch.nan), valid, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 70, pytest.param(200, marks=pytest.mark.gpu)])
def test_nothing_is_left_of_equal_states(n, dtype, device):
    states = drawn(2, 1, 24, n, dtype, 30.0).expand(-1, n, -1).contiguous().to(device)
    valid = torch.arange(n, device=device) < torch.tensor([[n], [n // 2]], device=device)
    assert not centre(states, valid).any()


def test_of_nearly_equal_states_what_differs_is_left(device):
    """All sums are exact: one state is apart from the others, which are nearer to the mean, by more than rounding."""
    states = torch.full((1, 64, 8), 7.25)
    states[0, 20, 3] += 2.0**-6
    check(states, torch.ones(1, 64, dtype=torch.bool), device)
    states[0, 20, 3] = 7.25 + 2.0**-13  # the others are as good as equal
    check(states, torch.ones(1, 64, dtype=torch.bool), device)


def test_more_than_a_block(device, monkeypatch):
    for name, size in {"_ROWS": 16, "_COLUMNS": 16, "_MOST_COLUMNS": 16, "_LENGTHS": 16}.items():
        monkeypatch.setattr(triton_module, name, size)
    check(drawn(3, 70, 50, 0), torch.arange(70) < torch.tensor([[70], [0], [33]]), device)


def test_states_of_float32_are_overwritten(device):
    states = drawn(1, 9, 8, 0).to(device)
    assert centre(states, torch.ones(1, 9, dtype=torch.bool, device=device)).data_ptr() == states.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "n", "size"), [(1, 256, 3584), (1, 4096, 3584), (3, 1024, 4096), (2, 300, 1536)])
def test_of_a_real_size(batch, n, size, dtype, device):
    numbers = torch.tensor([n, 0, n // 2][:batch])
    check(drawn(batch, n, size, 0, dtype), torch.arange(n) < numbers[:, None], device)
    equal = drawn(batch, 1, size, 1, dtype, 30.0).expand(-1, n, -1).contiguous().to(device)
    assert not centre(equal, torch.ones(batch, n, dtype=torch.bool, device=device)).any()
