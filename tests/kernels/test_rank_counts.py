"""The rank rule: the Triton twin gives the numbers of the plain function, whatever its factors are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels.rank_counts import RankRule, rank_counts_reference
from sparsevlm.kernels.triton import rank_counts as triton_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Among them what a sum or a product rounds to another whole number.
FACTORS = st.floats(0, 1) | st.sampled_from([0.0, 0.1, 0.3, 0.7, 0.9, 1.0, 1 - 1e-9, 0.1 - 1e-10, 1 / 3])
RULES = st.builds(RankRule, FACTORS, FACTORS, FACTORS, st.booleans(), st.integers(1, 60))


def check(numbers, ranks, most, rule, device=DEVICE):
    numbers, ranks = torch.tensor(numbers), torch.tensor(ranks)
    flags = [torch.zeros(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool, device=device)]
    wanted = rank_counts_reference(numbers, ranks, most, rule, flags[0])
    found = triton_module.rank_counts(numbers.to(device), ranks.to(device), most, rule, flags[1])
    for one, other in zip((*found, flags[1]), (*wanted, flags[0]), strict=True):
        assert torch.equal(one.cpu(), other)
    assert bool(flags[0]) == bool((ranks < 0).any())


@settings(max_examples=examples(300), deadline=None)
@given(
    samples=st.lists(st.tuples(st.integers(0, 300), st.integers(-1, 40)), min_size=1, max_size=5), rule=RULES,
    room=st.integers(0, 9),
)  # fmt: skip
def test_twin(samples, rule, room):
    numbers, ranks = zip(*samples, strict=True)
    check(numbers, ranks, max(numbers) + room, rule)


@pytest.mark.parametrize("recycles", [False, True])
@pytest.mark.parametrize("rank_lambda", [0.05, 0.7, 1.0])
def test_more_than_a_block(recycles, rank_lambda, device):
    numbers = [4096, 0, 1500, 1025, 7]
    check(numbers, [33, 0, 64, 1, 2], 4096, RankRule(rank_lambda, 0.5, 0.2, recycles, 8), device)


def test_faults_of_others_stay(device):
    flag = torch.ones(1, dtype=torch.bool, device=device)
    ranks = torch.tensor([2], device=device)
    triton_module.rank_counts(ranks + 9, ranks, 20, RankRule(1.0, 0.0, 0.0, False, 1), flag)
    assert bool(flag)


@pytest.mark.gpu
def test_all_of_many(device):
    """At every rank of every size, with factors that fall on whole numbers."""
    for rank_lambda in (0.1, 0.3, 1 - 1e-9):
        numbers, ranks = torch.cartesian_prod(torch.arange(0, 4097, 64), torch.arange(-1, 129)).unbind(1)
        check(numbers.tolist(), ranks.tolist(), 4096, RankRule(rank_lambda, 0.3, 0.7, True, 16), device)
