"""Merges: the Triton twin against the plain function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels.merge import write_merged_reference
from sparsevlm.kernels.places import indices_of_reference
from sparsevlm.kernels.triton import merge as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(numbers, n_keep, n, size, seed, dtype, kind):
    """Kept tokens of every sample, some of which take in others; what fills a sample up is no number."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(numbers)
    states = torch.randn(batch, n, size, generator=generator).to(dtype)
    states[torch.arange(n) >= torch.tensor(numbers)[:, None]] = torch.nan
    is_kept = torch.zeros((batch, n), dtype=torch.bool)
    target = torch.full((batch, n), -1)
    weight = torch.zeros(batch, n)
    for b, (number, few) in enumerate(zip(numbers, n_keep, strict=True)):
        chosen = torch.randperm(number, generator=generator)[:few].sort().values
        is_kept[b, chosen] = True
        target[b, chosen] = chosen
        weight[b, chosen] = 1.0
        if not few or kind == "nothing":
            continue
        centres = chosen[:1] if kind == "one" else chosen[: max(1, few // 2)]
        joins = torch.rand(number, generator=generator) < (1.0 if kind == "one" else 0.6)
        joins[chosen] = False
        others = joins.nonzero().squeeze(-1)
        target[b, others] = centres[torch.randint(len(centres), others.shape, generator=generator)]
        weight[b, others] = torch.rand(len(others), generator=generator)
        weight[b, centres[::2]] = 0.5
        if len(chosen) > 2:
            target[b, chosen[-1]] = -1  # kept, and no part of itself
    most = max(1, *n_keep)
    kept = indices_of_reference(is_kept, most)
    rows = torch.randperm(batch * most, generator=generator).view(batch, most)
    hidden = torch.randn(batch * most + 1, size, generator=generator).to(dtype)
    for b, few in enumerate(n_keep):
        hidden[rows[b, :few]] = states[b, kept[b, :few]]
    wider = torch.cat([rows, rows], dim=1)[:, :most]  # a view whose rows lie apart
    return hidden, wider, torch.tensor(n_keep), states, kept, target, weight


def check(inputs, device):
    wanted, found = inputs[0].clone(), inputs[0].to(device, copy=True)
    write_merged_reference(wanted, *inputs[1:])
    twin.write_merged(found, *(own.to(device) for own in inputs[1:]))
    torch.testing.assert_close(found[:-1].cpu(), wanted[:-1], rtol=0, atol=0, equal_nan=True)
    return wanted


@settings(max_examples=examples(15), deadline=None)
@given(
    data=st.data(), n=st.integers(1, 24), size=st.integers(1, 20), seed=st.integers(0, 1 << 30),
    dtype=st.sampled_from([torch.float32, torch.float16]), kind=st.sampled_from(["nothing", "one", "some"]),
)  # fmt: skip
def test_twin(data, n, size, seed, dtype, kind):
    """Sums are the same to the last bit: they are taken in the same order."""
    numbers = [data.draw(st.integers(0, n)) for _ in range(data.draw(st.integers(1, 4)))]
    n_keep = [data.draw(st.sampled_from([0, number, number // 2, min(1, number)])) for number in numbers]
    check(drawn(numbers, n_keep, n, size, seed, dtype, kind), DEVICE)


@pytest.mark.parametrize("kind", ["nothing", "one", "some"])
def test_more_than_a_block(kind, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(twin, "_OTHERS", 16)
        monkeypatch.setattr(twin, "_MOST_COLUMNS", 16)
    inputs = drawn([70, 30], [20, 9], 70, 33, 0, torch.float32, kind)
    wanted = check(inputs, device)
    assert torch.equal(wanted[:-1], inputs[0][:-1]) == (kind == "nothing")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nothing", "one", "some"])
@pytest.mark.parametrize(
    ("numbers", "n_keep"), [([4096], [1000]), ([4096], [1]), ([1024, 0, 700, 3], [512, 0, 700, 1])]
)
def test_of_a_real_size(numbers, n_keep, kind, dtype, device):
    check(drawn(numbers, n_keep, max(numbers), 3584, 0, dtype, kind), device)


@pytest.mark.gpu
def test_recorded_and_repeated(captured):
    inputs = drawn([2048, 3, 0, 900], [700, 1, 0, 100], 2048, 512, 0, torch.bfloat16, "some")
    wanted = inputs[0].clone()
    write_merged_reference(wanted, *inputs[1:])
    before, (hidden, *others) = inputs[0].cuda(), (own.cuda() for own in inputs)
    graph, _ = captured(twin.write_merged, hidden, *others)
    for _ in range(300):
        hidden.copy_(before)
        graph.replay()
        torch.testing.assert_close(hidden[:-1].cpu(), wanted[:-1], rtol=0, atol=0, equal_nan=True)
