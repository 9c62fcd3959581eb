"""Rounds of bipartite matching: the Triton twins against the plain functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import examples

from sparsevlm.kernels import bipartite_merge as plain
from sparsevlm.kernels.triton import bipartite_merge as twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECIAL = torch.tensor([torch.nan, 0.0, -0.0, 0.5, -1.0])


def drawn_scores(shape, seed, kind):
    """Distinct ones, a few that are tied, or with some that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "distinct":
        return torch.randn(shape, generator=generator)
    if kind == "equal":
        return torch.full(shape, 0.25)
    tied = torch.randint(-3, 4, shape, generator=generator) / 8
    special = SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.3, special, tied) if kind == "special" else tied


def check_partners(numbers, n_even, n_odd, seed, kind, device):
    similarity, n_left = drawn_scores((len(numbers), n_even, n_odd), seed, kind), torch.tensor(numbers)
    wanted = plain.best_partners_reference(similarity, n_left)
    found = twin.best_partners(similarity.to(device), n_left.to(device))
    assert [one.dtype for one in found] == [one.dtype for one in wanted]
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1].cpu(), wanted[1])


def drawn_round(n_rows, numbers, n_keep, n_tokens, seed, kind):
    """Rows of one or several tokens, behind which there is no token; a sample with more rows is done."""
    generator = torch.Generator().manual_seed(seed)
    n_left, n_even = torch.tensor(numbers), (n_rows + 1) // 2
    row_of, is_kept = torch.full((len(numbers), n_tokens), -1), torch.zeros((len(numbers), n_tokens), dtype=torch.bool)
    for b, number in enumerate(numbers):
        if number:
            n = n_tokens - seed % (n_tokens - number + 1)
            row_of[b, :n] = torch.randint(number, (n,), generator=generator)
            is_kept[b, :number] = True
            row_of[b, :number] = torch.arange(number)
    score = drawn_scores((len(numbers), n_even), seed, kind)
    partner = torch.randint(n_rows, (len(numbers), n_even), generator=generator) % (n_left[:, None] // 2).clamp_min(1)
    return score, partner, n_left, torch.tensor(n_keep), row_of, is_kept, n_rows


def check_round(given, device):
    wanted_of, found_of = ([own.to(where, copy=True) for own in given[:-1]] for where in ("cpu", device))
    wanted = plain.merge_best_pairs_reference(*wanted_of, given[-1])
    found = twin.merge_best_pairs(*found_of, given[-1])
    assert found.dtype == wanted.dtype
    assert torch.equal(found.cpu(), wanted)
    for one, other in zip(found_of, wanted_of, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
    return wanted, wanted_of


def check_sums(rows, places, most, device):
    wanted = plain.merged_rows_reference(rows, places, most)
    found = twin.merged_rows(rows.to(device), places.to(device), most)
    assert [one.dtype for one in found] == [one.dtype for one in wanted]
    torch.testing.assert_close(found[0].cpu(), wanted[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-5, atol=1e-7, equal_nan=True)


def drawn_rows(places, size, seed, dtype):
    """What comes nowhere is no number; some rows are 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*places.shape, size, generator=generator).to(dtype)
    rows[torch.rand(places.shape, generator=generator) < 0.2] = 0.0
    rows[places < 0] = torch.nan
    return rows


KINDS = ("distinct", "tied", "equal", "special")


@settings(max_examples=examples(20), deadline=None)
@given(data=st.data(), n=st.integers(2, 24), seed=st.integers(0, 1 << 30), kind=st.sampled_from(KINDS))
def test_twins(data, n, seed, kind):
    """Samples with nothing, with one row, that are done, and that merge all they can."""
    numbers = [data.draw(st.integers(0, n)) for _ in range(data.draw(st.integers(1, 4)))]
    n_keep = [data.draw(st.sampled_from([min(1, m), m // 2, (m + 1) // 2, max(0, m - 1), m])) for m in numbers]
    n_keep = [max(min(1, m), k) for m, k in zip(numbers, n_keep, strict=True)]
    check_partners(numbers, (n + 1) // 2, n // 2, seed, kind, DEVICE)
    numbers, n_keep = [*numbers, n + 3], [*n_keep, n + 3]  # done, and larger than what is left of the others
    places, _ = check_round(drawn_round(n, numbers, n_keep, n + 5, seed, kind), DEVICE)
    rows = drawn_rows(places, 1 + seed % 20, seed, torch.float16 if seed % 2 else torch.float32)
    check_sums(rows, places, (n + 1) // 2, DEVICE)


def test_odd_rows_that_do_not_count_are_nobodys_partner(device):
    """Not even where all that count are less similar than the 0 that a kernel reads in their place."""
    similarity = torch.full((5, 2, 3), -0.5, device=device)
    n_left = torch.tensor([1, 2, 3, 4, 5], device=device)
    for b, n_odd in enumerate(wanted := [0, 1, 1, 2, 2]):
        similarity[b, :, n_odd:] = 1.0
    for best_partners in (plain.best_partners_reference, twin.best_partners):
        score, partner = best_partners(similarity, n_left)
        assert score.tolist() == [[-0.5 if n_odd else -torch.inf] * 2 for n_odd in wanted]
        assert partner.tolist() == [[0, 0]] * 5


def test_a_round_by_hand():
    """Rows 0, 2, 4, 6 propose to 1, 3, 5; the two best merge: 4, and of the tied ones the first."""
    score, partner = torch.tensor([[0.5, 0.1, 0.9, 0.5]]), torch.tensor([[2, 0, 0, 1]])
    n_left, n_keep = torch.tensor([7]), torch.tensor([5])
    row_of, is_kept = (
        torch.tensor([[0, 1, 2, 3, 0, 4, 5, 6, -1]]),
        torch.tensor([[True] * 4 + [False] + [True] * 3 + [False]]),
    )
    places = plain.merge_best_pairs(score, partner, n_left, n_keep, row_of, is_kept, 7)
    assert places.tolist() == [[-1] * 7]  # nobody needs their sums
    assert n_left.tolist() == [5]
    assert row_of.tolist() == [[3, 0, 1, 2, 3, 0, 3, 4, -1]]
    assert is_kept.tolist() == [[False, True, True, True, False, False, True, True, False]]
    n_left, n_keep = torch.tensor([7]), torch.tensor([1])
    places = plain.merge_best_pairs(score, partner, n_left, n_keep, torch.arange(7)[None], torch.ones(1, 7) > 0, 7)
    assert places.tolist() == [[3, 0, 1, 2, 0, 3, 2]]
    assert n_left.tolist() == [4]
    sums, unit = plain.merged_rows(torch.eye(7)[None], places, 4)
    assert sums[0, 3].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(unit[0, 3], sums[0, 3] / 2**0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [37, pytest.param(4096, marks=pytest.mark.gpu)])
def test_more_than_a_block(n, kind, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(twin, "_BLOCK", 16)
        monkeypatch.setattr(twin, "_MOST_COLUMNS", 16)
    numbers, n_keep = [n, n - 1, 0, n, n], [1, n - n // 3, 0, n - 7, n]
    check_partners(numbers, (n + 1) // 2, n // 2, 3, kind, device)
    places, _ = check_round(drawn_round(n, numbers, n_keep, n + 9, 3, kind), device)
    check_sums(drawn_rows(places, 20, 3, torch.float32), places, (n + 1) // 2, device)


def test_all_rows_come_to_one_place(device):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        places = torch.zeros((2, 50), dtype=torch.int64)
        check_sums(drawn_rows(places, 33, 0, dtype), places, 25, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("numbers", "n_keep"), [([4096], [1000]), ([16384], [1]), ([1024, 0, 700, 3], [512, 0, 1, 1])])
def test_of_a_real_size(numbers, n_keep, dtype, device):
    n = max(numbers)
    places, _ = check_round(drawn_round(n, numbers, n_keep, n, 0, "tied"), device)
    check_sums(drawn_rows(places, 3584, 0, dtype), places, (n + 1) // 2, device)


@pytest.mark.gpu
def test_recorded_and_repeated(captured):
    numbers, n_keep = [1500, 3, 0, 800], [200, 1, 0, 700]
    *given, n_rows = drawn_round(1500, numbers, n_keep, 1500, 0, "tied")
    wanted, state = check_round((*given, n_rows), "cuda")
    rows = drawn_rows(wanted, 256, 0, torch.bfloat16)
    sums = plain.merged_rows_reference(rows, wanted, 750)[0]
    before, own = [one.cuda() for one in given], [one.cuda() for one in given]

    def run(rows, *own):
        places = twin.merge_best_pairs(*own, n_rows)
        return places, twin.merged_rows(rows, places, 750)[0]

    graph, found = captured(run, rows.cuda(), *own)
    for _ in range(300):
        for one, first in zip(own, before, strict=True):
            one.copy_(first)
        graph.replay()
        for one, other in zip((*found, *own[2:]), (wanted, sums, *state[2:]), strict=True):
            assert torch.equal(one.cpu(), other)
